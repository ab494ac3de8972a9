"""The distillation of a language model of examples/, at toy size."""

import sys

from tests.examples import scripts
from tests.tiers import whole


@whole
def test_the_student_of_the_teacher_is_better_than_that_of_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(scripts.EXAMPLES)])
    curves = scripts.load("language_model_distillation").main(tmp_path, smoke=True)
    last = {name: perplexities[-1] for name, perplexities in curves.items()}
    assert last["teacher"] < last["student of the teacher"] < last["student of the text"] < last["unigram model"]
    assert (tmp_path / "distillation.png").exists()
