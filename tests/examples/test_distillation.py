"""The distillation of examples/: from one seed, or with `--whole` from three."""

from tests.examples import scripts


def test_a_student_learns_from_its_teacher_a_digit_that_it_has_not_seen(request):
    whole = request.config.getoption("--whole")
    temperatures = (1, 2, 4) if whole else (4,)
    for result in scripts.load("distillation").main(3 if whole else 1, 20, temperatures):
        assert result["teacher"]["all digits"] > 0.93
        of_labels, of_teacher = result["student of the labels"], result["student of the teacher, T = 4"]
        assert of_labels["unseen digit"] < 0.02
        assert of_teacher["unseen digit"] > 0.6
        assert of_teacher["all digits"] > of_labels["all digits"] + 0.04
