"""A judge that breaks in the middle of a study, for tests of what is kept."""

from sdxl_sae_kit.judges import WorldJudge


class Breaking(WorldJudge):
    """A judge that is interrupted after so many calls."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def factors(self, pictures):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().factors(pictures)
