"""What is wrong with the section ``loss``. A file apart from ``mistakes``, which is about any key: these are about one
loss and its formula."""

from tt_train.config import LossSection, PreferenceSection
from tt_train.registry import PREFERENCE_KEYS, PREFERENCE_LOSSES


def loss_mistakes(loss: LossSection) -> list[str]:
    """Keys that a preference loss does not have, or not with this value."""
    if not isinstance(loss, PreferenceSection) or loss.name not in PREFERENCE_LOSSES:
        return []
    found, default = [], PreferenceSection()
    for key in PREFERENCE_KEYS:
        if key not in PREFERENCE_LOSSES[loss.name] and getattr(loss, key) != getattr(default, key):
            have = ", ".join(name for name, keys in PREFERENCE_LOSSES.items() if key in keys)
            found.append(f"loss.{key}: {loss.name} has none, only {have}; leave it out")
    if loss.name == "robust" and not loss.label_smoothing < 0.5:
        found.append(f"loss.label_smoothing: robust needs less than 0.5, got {loss.label_smoothing}")
    return found
