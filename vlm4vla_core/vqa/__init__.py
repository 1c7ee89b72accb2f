"""Questions about pictures: generated from what an episode store records (`embodied`), or read from files (`data`)."""

from vlm4vla_core.vqa.embodied import CLEARLY, KINDS, Question, availability, questions

__all__ = ["CLEARLY", "KINDS", "Question", "availability", "questions"]
