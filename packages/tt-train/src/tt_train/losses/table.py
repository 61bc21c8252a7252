"""Losses by name, and their keys in a config. Importing this loads no torch: names are checked before anything else."""

LOSSES = {"cross_entropy": "tt_train.losses.cross_entropy.cross_entropy"}
# the losses of preference tuning, and which keys of the section ``loss`` each of them has beside beta and sft_weight
PREFERENCE_LOSSES: dict[str, tuple[str, ...]] = {
    "sigmoid": ("label_smoothing",), "sigmoid_norm": ("label_smoothing",), "robust": ("label_smoothing",), "hinge": (),
    "ipo": (), "kto_pair": (), "apo_zero": (), "sppo_hard": (), "simpo": ("label_smoothing", "margin"), "orpo": (),
    "kto": ("desirable_weight", "undesirable_weight"),
}  # fmt: skip
PREFERENCE_KEYS = tuple(dict.fromkeys(key for keys in PREFERENCE_LOSSES.values() for key in keys))
REFERENCE_FREE = ("simpo", "orpo")
