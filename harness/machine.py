"""What a machine lacks for a run, asked before the first batch: each a line with what to do."""


def check(cfg) -> None:
    pass
