"""What jattn raises beside ValueError and TypeError."""

__all__ = ["UnsupportedAttentionError"]


class UnsupportedAttentionError(NotImplementedError):
    """No backend that may run can do the call; the text lists each one's reasons."""
