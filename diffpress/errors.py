"""What users see when something is wrong: one sentence with the value and what is allowed, and an exit code.

Every error that diffpress raises on purpose is a `DiffpressError`; anything else that escapes is a bug of ours.
"""

from __future__ import annotations

from dataclasses import dataclass


class DiffpressError(Exception):
    """Base class. ``exit_code`` is what the command line returns."""

    exit_code = 2


class CheckpointError(DiffpressError):
    """The checkpoint is missing, corrupt, of an unknown kind, or not safe to load."""


class ConfigError(DiffpressError):
    """A setting, argument or combination of them is not allowed."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a recipe: where (``file:line``, or the command line) and what."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class RecipeError(ConfigError):
    """Everything that is wrong with a recipe, at once."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class ArtifactError(DiffpressError):
    """An artifact folder is missing, incomplete, altered, or belongs to another run."""


class MissingDependencyError(DiffpressError):
    """An optional package is needed; the message names the install command."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install 'diffpress[{extra}]'")


class EngineError(DiffpressError):
    """An engine cannot be built, loaded or run as asked."""


class ParityError(EngineError):
    """The reloaded engine does not compute what the torch model computes."""


class PrecisionError(EngineError):
    """Precision that was asked for is not in the built graph."""


class SlowEngineError(EngineError):
    """The engine is slower than the baseline it was meant to beat."""

    exit_code = 1


class TrainingError(DiffpressError):
    """A training cannot go on: its loss is not finite."""

    exit_code = 1


class RegressionError(DiffpressError):
    """A gate failed: quality or latency is worse than allowed."""

    exit_code = 1


class NotComparableError(DiffpressError):
    """Two reports cannot be compared: other machine, versions, preprocessing or seeds."""

    exit_code = 3


class InfrastructureError(DiffpressError):
    """The machine failed: no space on disk, a read-only folder, out of memory, a lost file."""

    exit_code = 4
