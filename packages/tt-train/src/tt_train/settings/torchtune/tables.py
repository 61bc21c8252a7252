"""Facts of torchtune 0.1 to 0.6: its models, datasets, optimizers and losses by name, and what each is here.

A file of its own because it holds no code: a row is what changes if torchtune or this project learns a name.
"""

# builder, without lora_ or qlora_ -> (hub id of the weights in torchtune's configs, name in tt_models if there is one)
MODELS: dict[str, tuple[str, str | None]] = {
    "llama2_7b": ("meta-llama/Llama-2-7b-hf", "llama2_7b"),
    "llama2_13b": ("meta-llama/Llama-2-13b-hf", "llama2_13b"),
    "llama2_70b": ("meta-llama/Llama-2-70b-hf", "llama2_70b"),
    "code_llama2_7b": ("codellama/CodeLlama-7b-hf", "code_llama_7b"),
    "code_llama2_13b": ("codellama/CodeLlama-13b-hf", "code_llama_13b"),
    "code_llama2_70b": ("codellama/CodeLlama-70b-hf", "code_llama_70b"),
    "llama3_8b": ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3_8b"),
    "llama3_70b": ("meta-llama/Meta-Llama-3-70B-Instruct", "llama3_70b"),
    "llama3_1_8b": ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama3_1_8b"),
    "llama3_1_70b": ("meta-llama/Meta-Llama-3.1-70B-Instruct", "llama3_1_70b"),
    "llama3_1_405b": ("meta-llama/Meta-Llama-3.1-405B-Instruct", None),
    "llama3_2_1b": ("meta-llama/Llama-3.2-1B-Instruct", "llama3_2_1b"),
    "llama3_2_3b": ("meta-llama/Llama-3.2-3B-Instruct", "llama3_2_3b"),
    "llama3_3_70b": ("meta-llama/Llama-3.3-70B-Instruct", "llama3_3_70b"),
    "mistral_7b": ("mistralai/Mistral-7B-v0.1", "mistral_7b"),
    "gemma_2b": ("google/gemma-2b", "gemma_2b"),
    "gemma_7b": ("google/gemma-7b", "gemma_7b"),
    "gemma2_2b": ("google/gemma-2-2b", "gemma2_2b"),
    "gemma2_9b": ("google/gemma-2-9b", "gemma2_9b"),
    "gemma2_27b": ("google/gemma-2-27b", "gemma2_27b"),
    "phi3_mini": ("microsoft/Phi-3-mini-4k-instruct", "phi3_mini"),
    "phi4_14b": ("microsoft/phi-4", "phi4_14b"),
    "qwen2_0_5b": ("Qwen/Qwen2-0.5B-Instruct", "qwen2_0_5b"),
    "qwen2_1_5b": ("Qwen/Qwen2-1.5B-Instruct", "qwen2_1_5b"),
    "qwen2_7b": ("Qwen/Qwen2-7B-Instruct", "qwen2_7b"),
    **{
        f"qwen2_5_{size}_{kind}".removesuffix("_"): (
            f"Qwen/Qwen2.5-{size.replace('_', '.').upper()}{'-Instruct' * (kind == 'instruct')}", f"qwen2_5_{size}"
        )
        for size in ("0_5b", "1_5b", "3b", "7b", "14b", "32b", "72b") for kind in ("", "base", "instruct")
    },
}  # fmt: skip
TIED = ("gemma_", "gemma2_", "llama3_2_", "qwen2_0_5b", "qwen2_1_5b", "qwen2_5_0_5b", "qwen2_5_1_5b", "qwen2_5_3b")
FUSED = ("phi3_", "phi4_")  # Hugging Face's files, and so our layers, hold q, k and v as one, and gate and up
NO_MODELS = {"llama3_2_vision": "models with images are not supported", "clip": "models with images are not supported",
             "flux": "image generation is not supported", "t5": "encoders are not supported"}  # fmt: skip

# torchtune's -> ours
MODULES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
MLP = ["gate_proj", "up_proj", "down_proj"]
# builder of rows -> (registered name or hub id, keys of data, train_on_input by default)
DATASETS: dict[str, tuple[str, dict[str, object], bool]] = {
    "alpaca_dataset": ("alpaca", {}, True),
    "alpaca_cleaned_dataset": ("alpaca_cleaned", {}, True),
    "grammar_dataset": ("grammar", {}, False),
    "samsum_dataset": ("samsum", {}, False),
    "slimorca_dataset": ("slimorca", {}, False),
    "stack_exchange_paired_dataset": ("stack_exchange_paired", {"data_dir": "data/rl"}, False),
    "stack_exchanged_paired_dataset": ("stack_exchange_paired", {"data_dir": "data/rl"}, False),
    "hh_rlhf_helpful_dataset": ("RLHFlow/HH-RLHF-Helpful-standard", {"schema": "preference"}, False),
    "cnn_dailymail_articles_dataset": ("ccdv/cnn_dailymail", {"schema": "text", "columns": {"text": "article"}}, True),
    "wikitext_dataset": (
        "EleutherAI/wikitext_document_level", {"schema": "text", "columns": {"text": "page"}}, True,
    ),
}  # fmt: skip
INSTRUCT_TEMPLATES = {"AlpacaInstructTemplate": "alpaca", "GrammarErrorCorrectionTemplate": "grammar",
                      "SummarizeTemplate": "summarize", "StackExchangedPairedTemplate": "stack_exchange_paired",
                      "StackExchangePairedTemplate": "stack_exchange_paired"}  # fmt: skip
CHAT_FORMATS = {"Llama2ChatFormat": "llama2", "MistralChatFormat": "mistral", "ChatMLFormat": "chatml"}
FILE_KINDS = ("json", "csv", "parquet", "text", "arrow")  # of datasets.load_dataset, with data_files

# optimizer -> (ours, what differs)
OPTIMIZERS: dict[str, tuple[str, str]] = {
    "torch.optim.AdamW": ("adamw", ""),
    "torch.optim.Adam": ("adam", ""),
    "torch.optim.SGD": ("sgd", ""),
    "torch.optim.Adagrad": ("adagrad", ""),
    "torch.optim.RMSprop": ("rmsprop", ""),
    "bitsandbytes.optim.AdamW": ("adamw", ""),
    "bitsandbytes.optim.Adam": ("adam", ""),
    "bitsandbytes.optim.PagedAdamW": (
        "adamw", "the same update, but its moments are not paged to CPU memory; adamw8bit takes less memory",
    ),
    "bitsandbytes.optim.AdamW8bit": ("adamw8bit", "torchao's AdamW with moments of 8 bits; its rounding differs"),
    "bitsandbytes.optim.PagedAdamW8bit": (
        "adamw8bit", "torchao's AdamW with moments of 8 bits; its rounding differs, and nothing is paged to CPU memory",
    ),
    "torchao.prototype.low_bit_optim.AdamW8bit": ("adamw8bit", ""),
    "torchao.prototype.low_bit_optim.AdamW4bit": ("adamw4bit", ""),
    "torchao.optim.AdamW8bit": ("adamw8bit", ""),
    "torchao.optim.AdamW4bit": ("adamw4bit", ""),
}  # fmt: skip
CROSS_ENTROPIES = ("CrossEntropyLoss", "CEWithChunkedOutputLoss", "LinearCrossEntropyLoss")
# class of a preference loss -> (ours, its argument that is our beta)
PREFERENCE_LOSSES = {"DPOLoss": ("sigmoid", "beta"), "RSOLoss": ("hinge", "gamma"), "IPOLoss": ("ipo", "tau"),
                     "SimPOLoss": ("simpo", "beta")}  # fmt: skip
# logger -> (ours, its options that are ours under another name)
LOGGERS: dict[str, tuple[str, dict[str, str]]] = {
    "WandBLogger": ("wandb", {}),
    "TensorBoardLogger": ("tensorboard", {}),
    "CometLogger": ("comet", {"project_name": "project", "experiment_name": "name"}),
    "MLFlowLogger": ("mlflow", {"experiment_name": "experiment"}),
}
# key -> why it is not carried over; the others of torchtune's keys are
DROPPED = {
    "low_cpu_ram": "weights are mapped from their files",
    "custom_sharded_layers": "weights are sharded by block",
    "memory_efficient_fsdp_wrap": "weights are sharded by block",
    "tensor_parallel_dim": "layers are not split over devices; parallel.shard splits weights",
    "tensor_parallel_plan": "layers are not split over devices; parallel.shard splits weights",
    "data_parallel_replicate_dim": "set parallel.replicate",
    "data_parallel_shard_dim": "set parallel.shard",
    "fsdp_reshard_after_forward": "weights are always freed after the forward pass",
    "fsdp_sharding_strategy": "weights, gradients and optimizer state are sharded; see parallel.shard",
    "enable_async_checkpointing": "set save_async: true",
    "collate_fn": "rows are padded or packed by tt",
    "log_level": "-v shows tracebacks, and train.log keeps everything",
    "cudnn_deterministic_mode": "the same seed gives the same run on the same device",
    "packed": "set data.packing",
}
SILENT = ("log_peak_memory_stats", "tokenizer.merges_file", "tokenizer.merges_path", "tokenizer.vocab_path",
          "tokenizer.special_tokens_path", "checkpointer.model_type", "checkpointer.safe_serialization",
          "loss.num_output_chunks", "optimizer.fused", "optimizer.foreach",
          "save_adapter_weights_only", "checkpointer.output_dir", "ac_option")  # fmt: skip
