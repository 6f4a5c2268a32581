"""How a question and its lettered options become a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from graftlm.core.errors import DataError

__all__ = ["Wording", "letter_of"]


@dataclass(frozen=True, slots=True)
class Wording:
    """The words around a question.

    Attributes:
        instruction: what to answer with, at the end; empty is none.
        option: how an option is written, from ``{letter}`` and ``{text}``.
        separator: between question, options and instruction.
    """

    instruction: str = "Answer with the option's letter from the given choices directly."
    option: str = "{letter}. {text}"
    separator: str = "\n"

    def ask(self, question: str, options: Sequence[str] = ()) -> str:
        """The prompt."""
        listed = [
            self.option.format(letter=letter, text=text) for letter, text in zip(ascii_uppercase, options, strict=False)
        ]
        return self.separator.join(part for part in (question, *listed, self.instruction) if part)


def letter_of(index: int, options: Sequence[str], where: str) -> str:
    """The letter of an option.

    Raises:
        DataError: there is no such option, or no letter for it.
    """
    if not 0 <= index < min(len(options), len(ascii_uppercase)):
        raise DataError(
            f"{where}: the answer is option {index} of {len(options)}; one from 0 is expected. Restore the annotation file."
        )
    return ascii_uppercase[index]
