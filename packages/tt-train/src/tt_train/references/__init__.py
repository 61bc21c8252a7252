"""What a trained model is compared with: the model before training, and its log-probabilities kept on disk."""
