"""The options of torchrun that ``tt run`` takes, anywhere among its own. For run alone, which is long."""

import click

from tt_cli.group import ConfigVerb, Invocation

# torchrun's options, which tt run takes too, and whether a value follows; newer ones are taken after -- only
TORCHRUN = {
    **dict.fromkeys(
        ("nnodes", "nproc-per-node", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "rdzv-conf", "max-restarts",
         "monitor-interval", "start-method", "event-log-handler", "role", "log-dir", "redirects", "tee",
         "local-ranks-filter", "duplicate-stdout-filters", "duplicate-stderr-filters", "node-rank", "master-addr",
         "master-port", "local-addr", "logs-specs", "numa-binding", "signals-to-handle", "shutdown-timeout"), True),
    **dict.fromkeys(("standalone", "module", "no-python", "run-path", "virtual-local-rank"), False),
}  # fmt: skip


class RunVerb(ConfigVerb):
    """``tt run``: options of torchrun may be anywhere before ``--``, and all that comes after it is for torchrun."""

    more_options = TORCHRUN

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        cut = args.index("--") if "--" in args else len(args)
        ours, theirs, behind = args[:cut], [], args[cut + 1 :]
        index = 0
        while index < len(ours):
            name = ours[index].partition("=")[0].removeprefix("--").replace("_", "-")
            if not ours[index].startswith("--") or name not in TORCHRUN:
                index += 1
                continue
            length = 2 if TORCHRUN[name] and "=" not in ours[index] else 1
            theirs += ours[index : index + length]
            del ours[index : index + length]
        ctx.ensure_object(Invocation).launch = [*theirs, *behind]
        return super().parse_args(ctx, ours)
