"""The published setting, simulated: costs by hand, gains within their bounds, figures labelled as what they are."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from benchmarks import fusion_simulation as module
from benchmarks.fusion_simulation import LABEL, MODELS, SAMPLES, Case, Simulation, best_of, curve_table, instance_costs

CASE = Case("13B", "33B", 512)


@pytest.fixture(scope="module")
def simulation():
    return Simulation(CASE, draws=1)


@pytest.fixture(scope="module")
def curve(simulation):
    return simulation.curve([0, 32, 64, 80, 256, SAMPLES])


def test_costs_of_an_instance():
    """13B: 26 GB of weights at 8 x 2.039 x 0.8 = 13.05 TB/s, 80 all-reduces of 20 us; 26 Gflop a token at 8 x 156
    Tflop/s; keys and values of a token are 40 x 5120 x 2 numbers of 2 bytes."""
    costs = instance_costs(MODELS["13B"], MODELS["33B"])
    assert costs.step_seconds(1) == pytest.approx(1.9925e-3 + 1.6e-3, rel=1e-3)
    assert costs.prefill[1] == pytest.approx(2.0833e-5, rel=1e-3)
    assert costs.rows[1] == 172, "3.5925 ms / 20.833 us a row"
    assert costs.step_seconds(172) == costs.step_seconds(1) < costs.step_seconds(200)
    assert costs.per_context == pytest.approx(819200 / 13.05e12, rel=1e-3)
    assert costs.score == pytest.approx((1.6e-3 + 2 * 2.4e-3, 2 * 78e9 / 1.248e15), rel=1e-6)
    assert costs.cache_bytes == 102400


def test_samples_of_the_published_setting():
    shares = CASE.rollout(0)
    lengths = sorted(job.response for jobs in shares for job in jobs)
    assert [len(jobs) for jobs in shares] == [16] * 32
    assert lengths[0] >= 1 and lengths[-1] == 512
    assert lengths[SAMPLES // 2] == pytest.approx(128, rel=0.15), "the median is a quarter of the longest"
    assert 4 <= lengths.count(512) <= 32, "about 3 % are cut off"
    assert shares == CASE.rollout(0) != CASE.rollout(1)


def test_fusion_gains_and_no_more_than_scoring_takes(simulation):
    assert 1 <= simulation.gain(replace(simulation.chosen, threshold=0)) <= simulation.bound
    assert 1 <= simulation.gain(simulation.chosen) <= simulation.bound
    assert simulation.bound == pytest.approx(
        (simulation.generate_seconds + simulation.score_seconds) / simulation.generate_seconds
    )


def test_the_best_threshold_lies_between_none_and_all(simulation, curve):
    assert 0 < best_of(curve) < SAMPLES
    assert curve[best_of(curve)] > curve[0] > 1
    assert simulation.gain(simulation.chosen) > curve[0] - 0.02


def test_the_best_of_a_curve_is_the_smallest_of_equals():
    assert best_of({0: 1.0, 16: 1.2, 32: 1.2, 48: 1.1}) == 16


def test_tables_say_that_this_is_a_simulation():
    table = curve_table({"a": {0: 1.0, 8: 1.25, 16: 1.1}, "b": {0: 1.5, 8: 1.0, 16: 1.0}}, step=16).splitlines()
    assert LABEL in table[0]
    assert table[-1] == "| best | 1.250 at 8 (2%) | 1.500 at 0 (0%) |"
    assert [line.split("|")[1].strip() for line in table[4:-1]] == ["0", "16"]


def test_the_command_labels_its_output_and_draws_the_curve(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "PAIRS", (("13B", "33B"),))
    file = tmp_path / "pictures" / "curve.svg"
    module.main(["--draws", "1", "--longest", "512", "--step", "128", "--picture", str(file)])
    printed = capsys.readouterr().out
    assert printed.startswith("SIMULATION") and printed.count(LABEL) == 3
    assert "13B/33B, up to 512 tokens, median 128" in printed
    picture = ElementTree.parse(file).getroot()
    name = "{http://www.w3.org/2000/svg}"
    assert LABEL in " ".join(each.text for each in picture.iter(f"{name}text"))
    titles = {title.text: part for part in picture.iter(f"{name}g") for title in part.findall(f"{name}title")}
    (line,) = (part for title, part in titles.items() if title.startswith("up to 512"))
    assert line.find(f"{name}path").get("d").count("L") == 4 and len(line.findall(f".//{name}use")) == 1
