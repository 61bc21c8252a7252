"""``tt data``: a group of verbs about rows."""

from tt_cli.group import LazyGroup

command = LazyGroup(
    "data",
    sections={
        "Verbs": {"show": ("tt_cli.verbs.data_show", "Show rows as the model sees them, trained tokens marked.")}
    },
    help="Look at rows as the model sees them.",
)
