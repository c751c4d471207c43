"""Bytes and seconds as people read them."""


def bytes_text(count: float) -> str:
    """'3.2 MiB', at most four characters of number."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if count < 999.5:
            break
        count, unit = count / 1024, larger
    return f"{count:.1f} {unit}" if count < 99.95 and unit != "B" else f"{count:.0f} {unit}"


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def length_text(length: int) -> str:
    """'64k' for 65,536 tokens, '1M' for 1,048,576."""
    if length % 2**20 == 0:
        return f"{length // 2**20}M"
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
