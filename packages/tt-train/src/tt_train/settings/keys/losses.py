"""What is wrong with the section ``loss``. A file apart from ``mistakes``, which is about any key: these are about one
loss and its formula."""

from tt_train.config import PreferenceSection, RunConfig
from tt_train.losses.table import PREFERENCE_KEYS, PREFERENCE_LOSSES, REFERENCE_FREE


def loss_mistakes(config: RunConfig) -> list[str]:
    """Keys that a preference loss does not have, or not with this value."""
    loss = config.loss
    if not isinstance(loss, PreferenceSection):
        return []
    found, default = [], PreferenceSection()
    if loss.reference_cache is not None:
        found += [f"loss.reference_cache: {problem}" for problem in _cache_mistakes(config, loss.name)]
    if loss.name not in PREFERENCE_LOSSES:
        return found
    for key in PREFERENCE_KEYS:
        if key not in PREFERENCE_LOSSES[loss.name] and getattr(loss, key) != getattr(default, key):
            have = ", ".join(name for name, keys in PREFERENCE_LOSSES.items() if key in keys)
            found.append(f"loss.{key}: {loss.name} has none, only {have}; leave it out")
    if "label_smoothing" in PREFERENCE_LOSSES[loss.name] and 0.5 <= loss.label_smoothing < 1:
        found.append(
            f"loss.label_smoothing: must be less than 0.5, got {loss.label_smoothing}: from 0.5 on, rejected answers "
            "would be preferred; if the labels are the wrong way round, swap the columns by data.columns"
        )
    if loss.name == "kto" and loss.desirable_weight == loss.undesirable_weight == loss.sft_weight == 0:
        found.append(
            "loss.desirable_weight: 0 as undesirable_weight is, so that nothing trains; set one of them above 0"
        )
    return found


def _cache_mistakes(config: RunConfig, name: str) -> list[str]:
    found = []
    if name in REFERENCE_FREE:
        found.append(f"{name} compares with no reference; leave it out")
    if config.data.streaming:
        found.append("a stream has no rows to keep numbers for; set data.streaming=false, or leave it out")
    if config.adapter is not None and config.adapter.init == "loftq":
        found.append("what adapter.init=loftq starts from is in no file; leave it out, or use init=kaiming")
    return found
