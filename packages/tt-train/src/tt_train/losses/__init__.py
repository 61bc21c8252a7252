"""What a run makes smaller: objectives, and what preference losses compare with."""
