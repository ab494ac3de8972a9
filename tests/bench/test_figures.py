"""What tools/bench makes of figures: a file, tables, bars, pages and pictures."""

import json
import os
import re
import subprocess

import pytest

from keras_xent._backend._buckets import bucket_of
from tools.bench import __main__ as command
from tools.bench import agreement, bars, measuring, pages, pictures, results, rows, rows_of_gpu, tables
from tools.bench.shapes import LANGUAGE_MODEL, SMALL_MODEL
from tools.bench.workers import ROOT


def record(row, case, unit="milliseconds", missing=None, **values):
    values = {name.replace("_", ", ", 1): numbers for name, numbers in values.items()}
    names = [*values, *(missing or {})]
    rounds = max((len(numbers) for numbers in values.values()), default=0)
    found = {"row": row, "case": case, "unit": unit, "peers": names, "rounds": rounds}
    return found | {"values": values, "missing": missing or {}}


SPARSE = rows.of_loss("sparse", LANGUAGE_MODEL, "float32")
MACHINE = {
    "processor": "one",
    "cores": 2,
    "system": "Linux",
    "python": "3",
    "tensorflow": "2",
    "keras": "3",
    "torch": None,
}
FOUND = {
    "machine": MACHINE,
    "rows": [
        record(
            "sparse",
            SPARSE,
            missing={"PyTorch": "there is no .venv-torch"},
            ours=[10.0, 20.0, 10.0],
            Keras_graph=[40.0, 60.0, 30.0],
            Keras_XLA=[10.0, 20.2, 10.0],
            floor=[5.0, 10.0, 5.0],
        ),
        record("sparse", {**SPARSE, "dtype": "bfloat16"}, ours=[8.0] * 3, Keras_graph=[4.0] * 3),
        record("vocabulary", rows.of_head(SMALL_MODEL, calls=2), "megabytes", ours=[100], optax=[300]),
    ],
}

TABLE = """\
Milliseconds, medians of 3 rounds.

| [rows, classes] | dtype | smoothing | keras_xent | Keras, graph | Keras, XLA | floor | PyTorch |
|---|---|---|--:|--:|--:|--:|--:|
| [2048, 32000] | float32 | 0 | **10** | 40 (3.00) | **10** (1.00, tie) | 5 (0.50) | – |

- PyTorch –: there is no .venv-torch."""


def test_a_table_has_medians_ratios_ties_and_dashes_with_their_reasons():
    assert tables.table(FOUND, "sparse", dtype="float32") == TABLE


def test_a_row_that_was_not_measured_says_so():
    assert tables.table(FOUND, "gemma") == "Not measured yet."


def test_every_peer_that_is_faster_than_ours_is_listed():
    assert tables.faster(FOUND).splitlines()[2:] == ["| sparse | [2048, 32000], bfloat16, 0 | Keras, graph 2.00 |"]
    assert tables.faster({"rows": FOUND["rows"][:1]}) == "None."


def test_bars_are_met_or_not_or_not_measured():
    lines = bars.table(FOUND).splitlines()
    assert "| sparse: Keras in a graph / ours | ≥ 3 | 3.00 | yes |" in lines
    assert "| sparse: Keras under XLA / ours | ≥ 1.6 | 1.00 | no |" in lines
    assert "| sparse: PyTorch / ours | ≥ 3 | – | not measured |" in lines
    assert "| sparse: ours / the memory traffic alone | ≤ 1.6 | 2.00 | no |" in lines
    assert len(lines) == 2 + len(bars.BARS)


@pytest.mark.parametrize(
    "bound, number, met",
    [(">= 1", 1.0, "yes"), (">= 1", 0.97, "a tie"), (">= 1", 0.96, "no"), ("<= 1", 1.03, "a tie"), ("<= 1", 1.04, "no")]
    + [("<= 1.2", 1.2, "yes"), ("<= 1.2", 1.21, "no"), (">= 3", 2.99, "no"), ("<= 1", None, "not measured")],
)
def test_only_where_the_bound_is_1_there_are_ties(bound, number, met):
    assert bars.Bar("", bound, lambda results: number).met(number) == met


def test_every_bar_can_be_worked_out_from_the_rows_that_the_command_measures():
    """With figures that say 1 everywhere, no bar is left that was not measured."""
    ones = [
        {
            **record(work.row, work.case, work.unit),
            "peers": list(work.peers),
            "values": dict.fromkeys(work.peers, [1.0]),
            "first": dict.fromkeys(work.peers, 1.0),
        }
        for works in rows.ROWS.values()
        for work in works()
    ]
    assert "not measured" not in bars.table({"machine": MACHINE, "rows": ones})
    # What is said of all heads waits for all of them.
    found = [one for one in ones if one["row"] != "linear"] + [one for one in ones if one["row"] == "linear"][1:]
    (waiting,) = [line for line in bars.table({"machine": MACHINE, "rows": found}).splitlines() if "worst of 3" in line]
    assert waiting.endswith("| not measured |")


def test_cases_have_keys_of_their_own_and_ours_is_the_first_of_the_peers():
    works = [work for works in rows.ROWS.values() for work in works()]
    keys = {json.dumps([work.row, work.case, work.unit], sort_keys=True) for work in works}
    assert len(keys) == len(works) > 50
    assert all(next(iter(w.peers)).startswith("ours") for w in works if w.row not in ("callbacks", "import"))


def test_there_are_steps_for_which_ours_compiles_a_program_and_steps_for_which_it_has_one():
    def sizes(row, numbers):
        case = next(work.case for work in rows.ROWS[row]() if work.case["rows"] == numbers)
        return [bucket_of(length, case["classes"]) for length in case["lengths"]]

    larger = sizes("first-step", "larger")
    assert len(set(larger)) == len(larger) == rows.ROUNDS + measuring.WARM_UP + 1
    assert len(set(sizes("compilations", "60 sizes"))) == 1
    assert len(set(sizes("compilations", "60 sizes to 3998"))) == 12


def test_numbers_have_no_exponents():
    assert [tables.number(value, 2) for value in (99.6, 99.4, 1234.5, 0.0736)] == ["100", "99", "1,234", "0.074"]
    assert [tables.number(value) for value in (99.96, 99.94)] == ["100", "99.9"]


def test_a_record_takes_the_place_of_one_of_the_same_case_and_others_stay(tmp_path):
    found = json.loads(json.dumps(FOUND))
    results.add(found, record("sparse", SPARSE, ours=[1.0] * 9))
    results.write(found, tmp_path / "results.json")
    again = results.read(tmp_path / "results.json", MACHINE | {"torch": "2.13"})
    assert [r["values"].get("ours", [0])[0] for r in again["rows"]] == [1.0, 8.0, 100]
    assert again["machine"]["torch"] == "2.13"
    assert results.has(again, "sparse", SPARSE, "milliseconds", rounds=9)
    assert not results.has(again, "sparse", {**SPARSE, "dtype": "bfloat16"}, "milliseconds", rounds=9)
    assert results.has(again, "vocabulary", rows.of_head(SMALL_MODEL, calls=2), "megabytes", rounds=9)


def test_figures_of_two_machines_are_not_mixed(tmp_path):
    path = tmp_path / "results.json"
    results.write(FOUND, path)
    with pytest.raises(SystemExit) as error:
        results.read(path, MACHINE | {"cores": 4})
    assert str(error.value) == (
        f"{path} was measured where cores is 2, and here it is 4. Remove it, or name another file with --output."
    )


def test_the_command_prints_the_tables_of_a_file(tmp_path, capsys):
    results.write(FOUND, tmp_path / "results.json")
    command.main(["table", str(tmp_path / "results.json")])
    printed = capsys.readouterr().out
    assert printed.startswith("processor one, cores 2, system Linux, python 3, tensorflow 2, keras 3.\n\n### sparse\n")
    with pytest.raises(SystemExit, match="^There are no results in nowhere.json: tools/bench/run makes them.$"):
        command.main(["table", "nowhere.json"])


def test_a_row_that_breaks_does_not_cost_the_others(tmp_path, monkeypatch, capsys):
    works = [rows.Work("sparse", {**SPARSE, "dtype": dtype}, {}) for dtype in ("float64", "float32")]

    def measured(work, workers, rounds):
        if work.case["dtype"] == "float64":
            raise agreement.Disagreement("ours: not the same result")
        return record("sparse", work.case, ours=[3.0] * rounds)

    monkeypatch.setattr(measuring, "record", measured)
    monkeypatch.setattr(measuring, "versions", lambda workers: {})
    monkeypatch.setitem(command.ROWS, "sparse", lambda: works)
    path = tmp_path / "results.json"
    run = ["run", "--only", "sparse", "--output", str(path)]
    reason = "Not measured:\nsparse [2048, 32000] float64 0: ours: not the same result"
    with pytest.raises(SystemExit, match="^" + re.escape(reason) + "$"):
        command.main(run)
    assert [(r["case"]["dtype"], r["rounds"]) for r in results.read(path)["rows"]] == [("float32", rows.ROUNDS)]
    # What is there already is left out.
    works.pop(0)
    monkeypatch.setattr(measuring, "record", None)
    command.main([*run, "--resume"])
    assert "| [2048, 32000] | float32 | 0 | 3 |" in capsys.readouterr().out


def test_the_command_draws_the_two_pictures(tmp_path, capsys):
    results.write(FOUND, tmp_path / "results.json")
    command.main(["plot", str(tmp_path / "results.json"), "--output", str(tmp_path / "pictures")])
    drawn = [tmp_path / "pictures" / name for name in (pictures.TIME, pictures.MEMORY)]
    assert capsys.readouterr().out.split() == [str(path) for path in drawn]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


@pytest.mark.parametrize("name", ["run", "table", "plot", "install"])
def test_the_commands_are_one_script(name):
    script = ROOT / "tools" / "bench" / name
    assert script.resolve() == (ROOT / "tools" / "bench" / "run").resolve()
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


def test_pages_are_filled_between_their_marks_only():
    page = "before\n<!-- bench: machine -->\nold\n<!-- /bench -->\nafter\n<!-- bench: gemma -->\n<!-- /bench -->\n"
    filled = pages.filled(page, {"machine": MACHINE, "rows": []})
    assert filled == (
        "before\n<!-- bench: machine -->\nprocessor one, cores 2, system Linux, python 3, tensorflow 2, keras 3."
        "\n<!-- /bench -->\nafter\n<!-- bench: gemma -->\nNot measured yet.\n<!-- /bench -->\n"
    )
    assert pages.filled(filled, {"machine": MACHINE, "rows": []}) == filled


def test_the_summary_tells_gains_from_losses_by_the_figures():
    sizes = {"rows": 65536, "dtype": "float32", "smoothing": 0.0}
    found = {"rows": [*FOUND["rows"], record("sparse", sizes, ours=[100.0], Keras_graph=[30.0])]}
    gained, lost = (pages.block(name, found).splitlines() for name in ("better", "worse"))
    assert [line.split(" | ")[1:] for line in gained[2:4]] == [
        ["Keras in a graph, as `fit` runs it on a CPU", "10 ms", "40 ms", "4 |"],
        ["Keras under `jit_compile=True`", "10 ms", "10 ms", "1 |"],
    ]
    assert gained[3].startswith("| the same |")
    assert lost[2].split(" | ")[2:5] == ["100 ms", "30 ms", "3.3"]
    assert lost[3] == ""


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_the_figures_on_a_page_are_those_of_the_results_that_are_kept(page):
    """Else: `tools/bench/table --write docs/performance.json`."""
    text = page.read_text()
    names = re.findall(r"<!-- bench: (\S+) -->", text)
    measured = {work.row for row in [*rows.ROWS.values(), *rows_of_gpu.ROWS.values()] for work in row()}
    assert names and set(names) <= measured | set(pages.BLOCKS)
    assert pages.filled(text, results.read(pages.RESULTS)) == text


def test_every_row_is_on_the_page_of_tables():
    measured = {work.row for row in [*rows.ROWS.values(), *rows_of_gpu.ROWS.values()] for work in row()}
    assert measured <= set(re.findall(r"<!-- bench: (\S+) -->", pages.TABLES.read_text()))


def test_a_page_names_the_cases_that_were_not_measured():
    """Where ours gives a wrong result nothing is timed: that is no reason to be silent about the case."""
    first, *others = rows.ROWS["eager"]()
    found = {"rows": [record("eager", first.case, ours=[1.0], Keras=[2.0])]}
    assert pages.block("eager", found).endswith(
        "\n\nNot measured: [8, 64, 64, 5], TensorFlow; [32, 10], JAX; [8, 64, 64, 5], JAX."
    )
    found["rows"] += [record("eager", work.case, ours=[1.0], Keras=[2.0]) for work in others]
    assert "Not measured" not in pages.block("eager", found)
