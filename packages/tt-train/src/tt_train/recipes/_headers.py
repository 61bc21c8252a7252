"""What the headers of the weights say, before weights load."""

from pathlib import Path
from typing import Any

import tt_ckpt
import tt_models


def check_headers(model_config: Any, model_path: Path | None) -> None:
    """ValueError, FileNotFoundError if names or shapes are not the model's, or a file is not whole."""
    if model_path is not None:
        tt_ckpt.check_weights(tt_models.build(model_config, device="meta"), model_path)
