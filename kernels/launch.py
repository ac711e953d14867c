"""The launch table: block sizes, warps and stages for each kernel, dtype and size, as plain data. No autotuner runs."""


def langevin(elements: int) -> tuple[int, bool]:
    """(groups of four elements in a program, whether a program stays within one chain), four warps each.

    Long chains are cut into blocks of which at most an eighth may lie beyond the chain's end; else programs run over the
    chains' groups one after the other, at the price of a division for each group."""
    for groups in (512, 256, 128):
        padded = -(-elements // (4 * groups)) * 4 * groups
        if padded * 8 <= elements * 9:
            return groups, True
    return 256, False
