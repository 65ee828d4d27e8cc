"""What looks like a collapse, from made-up metrics."""

import pytest

from training.step3_rlhf.watch import Watch

HEALTHY = {
    "kl/reference": 2.0,
    "kl/reference_per_token": 0.05,
    "response/length_mean": 40.0,
    "response/distinct_bigrams": 0.9,
    "value/explained_variance": 0.3,
    "reward/length_correlation": 0.1,
    "reward/clipped_fraction": 0.0,
    "reward/scaled_std": 1.0,
    "reward/groups_alike": 0.2,
    "response/ended_fraction": 0.9,
    "update/mini_batches": 4,
}
END_PENALTY = 1.0


def watch_run(**courses: list[float]) -> tuple[list[dict[str, float]], list[list[str]]]:
    """The metrics and sentences of each iteration, where some metrics take other courses than healthy ones."""
    names = {name.replace("/", "_"): name for name in HEALTHY}
    watch, states, sentences = Watch(END_PENALTY), [], []
    for iteration in range(max(len(course) for course in courses.values())):
        changed = {names[key]: course[iteration] for key, course in courses.items()}
        state, said = watch.look({**HEALTHY, **changed})
        states.append(state)
        sentences.append(said)
    return states, sentences


@pytest.mark.parametrize(
    ("kind", "metric", "course", "first"),
    [
        ("kl", "kl_reference", [2.0] * 5 + [5.9, 12.0], 6),  # 5.9 < 3 * 2; 12 > 3 * (4 * 2 + 5.9) / 5
        ("kl_drift", "kl_reference", [5.0] * 5 + [5.0 * 1.2**n for n in range(1, 10)], 13),  # 1.2^9 = 5.2
        ("kl_drift", "kl_reference", [2.0 + n for n in range(19)], 18),  # 20 at last; 5 times 4 before that
        ("kl_far", "kl_reference_per_token", [0.4, 0.49, 0.51, 0.3], 2),
        ("length", "response_length_mean", [40.0] * 5 + [14.0, 13.0], 6),  # 40 / 3 = 13.3
        ("length", "response_length_mean", [40.0] * 5 + [119.0, 121.0], 6),
        ("repetition", "response_distinct_bigrams", [0.9] * 5 + [0.5, 0.4], 6),
        ("critic", "value_explained_variance", [-0.1] * 12, 9),  # ten in a row
        ("length_reward", "reward_length_correlation", [0.1] * 5 + [0.6] * 5, 9),
        ("alike", "reward_scaled_std", [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], 5),  # three in a row
        ("alike", "reward_groups_alike", [1.0, 0.9, 1.0, 1.0, 1.0, 1.0], 4),  # each group in itself
        ("clip", "reward_clipped_fraction", [0.1, 0.11, 0.5], 1),
        ("end_penalty", "reward_scaled_std", [0.11, 0.09, 0.09], 1),  # ten of them are less than the penalty
        ("truncated", "update_mini_batches", [4, 1, 0, 4, 0], 2),
    ],
)
def test_each_kind_shows_in_the_metrics_and_is_said_once(kind, metric, course, first):
    together = {"kl_reference": [6.0] * len(course)} if kind == "kl_far" else {}
    states, sentences = watch_run(**{metric: course}, **together)
    shown = [bool(state[f"warning/{kind}"]) for state in states]
    assert shown.index(True) == first
    assert [bool(said) for said in sentences] == [i == first for i in range(len(course))]
    assert not any(state[name] for state in states for name in state if name != f"warning/{kind}")


@pytest.mark.parametrize(
    ("metric", "course"),
    [
        ("kl_reference", [0.01, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 4.9]),  # grows from nothing, and is small
        ("kl_reference", [6.0] * 20),
        ("kl_reference", [0.1, 2.0, 5.0, 8.0, *(8.0 + n for n in range(1, 12))]),  # 19 nats a response: usual
        ("kl_reference_per_token", [0.9] * 20),  # of two nats a response
        ("reward_scaled_std", [0.0, 0.0, 1.0] * 7),  # rare successes; scores without any difference drown in nothing
        ("response_ended_fraction", [0.0, 1.0] * 10),
        ("value_explained_variance", [-0.1] * 9 + [0.01] + [-0.1] * 9),
        ("reward_length_correlation", [0.6] * 20),  # it has always been so
        ("response_length_mean", [4.0, 200.0, 40.0, 40.0, 40.0] + [60.0] * 10),
    ],
)
def test_nothing_is_said_of_what_is_healthy(metric, course):
    states, sentences = watch_run(**{metric: course})
    assert not any(any(state.values()) for state in states) and not any(sentences)


def test_a_watch_that_reads_the_metrics_again_has_said_what_was_said():
    course = [{**HEALTHY, "kl/reference": kl} for kl in (2.0, 2.0, 2.0, 2.0, 2.0, 30.0, 200.0)]
    whole, resumed = Watch(), Watch()
    said = [whole.look(metrics) for metrics in course]
    for metrics in course[:6]:
        resumed.look({**metrics, "number": 1})
    assert said[5][1] and resumed.look(course[6]) == said[6] and not said[6][1]


def test_where_kl_is_not_measured_nothing_is_said_of_it():
    watch = Watch()
    metrics = {name: value for name, value in HEALTHY.items() if not name.startswith("kl/reference")}
    assert not any("kl" in name for _ in range(12) for name in watch.look(metrics)[0])


def test_a_run_without_a_critic_has_no_warning_of_one():
    watch = Watch()
    metrics = {name: value for name, value in HEALTHY.items() if not name.startswith("value/")}
    assert all(watch.look(metrics)[0]["warning/critic"] == 0 for _ in range(12))
