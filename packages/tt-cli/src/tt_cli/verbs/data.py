"""``tt data``: a group of verbs about rows."""

from tt_cli.group import LazyGroup

command = LazyGroup(
    "data",
    table={"show": ("tt_cli.verbs.data_show", "Rows as the model sees them, trained tokens marked.")},
    help="Look at rows as the model sees them.",
)
