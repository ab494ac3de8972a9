"""The distillation of examples/, from three seeds."""

from tests.examples import scripts
from tests.tiers import whole


@whole
def test_a_student_learns_from_its_teacher_a_digit_that_it_has_not_seen():
    for result in scripts.load("distillation").main(3, 20, (1, 2, 4)):
        assert result["teacher"]["all digits"] > 0.93
        of_labels, of_teacher = result["student of the labels"], result["student of the teacher, T = 4"]
        assert of_labels["unseen digit"] < 0.02
        assert of_teacher["unseen digit"] > 0.6
        assert of_teacher["all digits"] > of_labels["all digits"] + 0.04
