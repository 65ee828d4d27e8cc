"""The page from files made by hand: what it shows, that it is inert, and how a real browser lays it out."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import expect

from applications.report.page import render, reward_accuracy, signs, write_report
from inference.errors import UserError
from inference.preferences import PreferenceFile
from tests.applications.report.test_charts import schemes
from tests.training.evaluation.preferences import preference
from training.run_directory import RunDirectory
from training.steps import METHODS, PPO, REWARD, SFT

ATTACK = "</p><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> & more"
LONG = "wordwithoutanybreak" * 30
MEASURES = {
    "learned_reward": 0.25,
    "true_score": 0.3,
    "length": 12.0,
    "ended_fraction": 0.9,
    "distinct_bigrams": 0.6,
    "most_frequent_share": 0.01,
    "perplexity_untouched": 30.0,
    "kl": 0.0,
}
WIN = {"prompts": 40, "rate": 0.75, "low": 0.61, "high": 0.89, "judge": "upbeat score"}


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_run(path, evaluated: bool = True, rlhf: dict | None = None, attack: str = ATTACK) -> RunDirectory:
    run = RunDirectory(path / "report <run>")
    run.path.mkdir()
    settings = {"model": "tiny", "seed": 7, "rlhf": {"kl": {"stop": 9.0}}, "versions": {"torch": "2.13.0"}}
    run.config_file.write_text(yaml.safe_dump(settings))
    for step in METHODS["ppo"]:
        run.step(step).model.mkdir(parents=True)
        run.step(step).result_file.write_text(json.dumps({"seconds": 60.0 * step.number, "eval/accuracy": 0.81}))
    kept = {"seconds": 180.0, "eval/accuracy": 0.81, "iterations": 17, "kept": 9}
    run.step(PPO).result_file.write_text(json.dumps(kept))
    run.step(SFT).metrics_file.write_text(
        lines([{"number": n, "loss": 4 - n / 50, "time/train": 0.5, "tokens_per_second": 900.0} for n in range(1, 100)])
        + lines([{"number": 99, "eval/loss": 2.2, "eval/perplexity": 9.0}])
    )
    run.step(REWARD).metrics_file.write_text(lines([{"number": n, "loss": 0.6, "accuracy": 0.7} for n in range(9)]))
    ppo = {"reward/score_std": 0.5, "kl/reference": 1.5, "response/length_mean": 14.0, "time/generate": 3.0}
    ppo |= {"plan/actor_train/predicted": 4.0, "plan/actor_train/achieved": 5.0}
    spans = [[["actor_train", 0.25, 5.25]], [["critic_train", 0.25, 2.25]]]
    was_to = [[["reallocation", 0.0, 0.5], ["actor_train", 0.5, 4.5]], [["critic_train", 0.0, 1.0]]]
    run.step(PPO).iteration_file.write_text(json.dumps({"iteration": 17, "achieved": spans, "predicted": was_to}))
    run.step(PPO).metrics_file.write_text(
        lines([{"number": n, "reward/score_mean": n / 10, "policy/entropy": float("nan"), **ppo} for n in range(1, 18)])
        + lines([{"number": n, "eval/reward": n / 12, "eval/distinct_bigrams": 0.5} for n in (0, 9, 17)])
    )
    run.step(PPO).samples_file.write_text(
        lines([{"number": n, "prompt": attack, "response": f"{attack} {n}"} for n in (0, 8, 17)])
    )
    sample = {"number": 17, "prompt": f"<|user|>{attack}", "truncated": False, "response_ids": [1, 2, 3, 0]}
    sample |= {"reward/model": 0.5, "reward/score": 0.5, "reward/missing_end": 0.0, "kl": [0.05, -0.7, 3.0, 0.2]}
    samples = [
        {**sample, "sample": n, "reward/kl": -n / 4, "reward/total": 0.5 - n / 4, "advantages": [-2.5, n, n / 5, n]}
        | {"tokens": [attack, "\n", LONG, "<|end|>"]}
        for n in range(2)
    ]
    run.step(PPO).rollouts_file.write_text(lines([sample | {"number": 16}]) + lines(samples))
    (run.step(PPO).path / "first_update.json").write_text(json.dumps({"ratio_error": 1e-7, "kl_old": 0.0}))
    if evaluated:
        rlhf = {**MEASURES, "learned_reward": 1.5, "true_score": 0.7, "kl": 2.5, **(rlhf or {})}
        sampling = {"temperature": 0.8, "max_tokens": 32}
        result = {"prompts": 40, "sampling": sampling, "sft": MEASURES, "rlhf": rlhf, "win_rate": WIN}
        run.comparison_of(PPO)[0].write_text(json.dumps(result))
        prompt = [{"role": "system", "content": attack}, {"role": "user", "content": "Hi"}]
        answers = {"prompt": prompt, "sft": attack, "rlhf": LONG, "sft_score": 0.25, "rlhf_score": 0.5}
        run.comparison_of(PPO)[1].write_text(lines([answers] * 12))
        for by, winner in (("<b>ann</b>", "other"), ("<b>ann</b>", "tie"), ("ben", "other")):
            theirs, ours = ("report <run>/sft", f"{LONG}{winner}"), ("report <run>/rlhf", attack)
            PreferenceFile(run.preferences).add(preference(by, winner, "Hi?", theirs, ours))
    return run


class Tags(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.captions: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data + " "
        if self.tags and self.tags[-1][0] == "figcaption":
            self.captions.append(data.strip())

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    return write_report(make_run(directory), directory / "report.html")


@pytest.fixture(scope="module")
def tags(report) -> Tags:
    return Tags(report.read_text())


def test_what_a_model_said_is_text_and_nothing_else(tags):
    assert ATTACK in tags.text and "report <run>" in tags.text
    assert tags.count("script") == tags.count("img") == tags.count("link") == tags.count("a") == 0
    names = {name for _, attributes in tags.tags for name in attributes}
    assert not {name for name in names if name.startswith("on")} and not names & {"src", "href", "style"}
    ids = [attributes["id"] for _, attributes in tags.tags if "id" in attributes]
    used = {attributes["xlink:href"] for _, attributes in tags.tags if "xlink:href" in attributes}
    assert len(set(ids)) == len(ids) and used == {f"#{each}" for each in ids}  # no picture comes from outside
    (policy,) = (a["content"] for _, a in tags.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-")


def test_everything_has_its_place(tags):
    text = " ".join(tags.text.split())
    preference = "RLHF beats SFT in 75.0% of prompts by upbeat score (95 % interval 61.0% to 89.0%; a tie counts half)."
    assert preference in text
    assert "Out of bounds" not in text
    assert "75.0% (61.0% to 89.0%)" in text and "KL to SFT (nats a reply) 0.00 2.50" in text
    assert "The model is that after iteration 9 of 17, which had the best evaluation." in text
    assert "seed 7 1" in text  # what differs from the default, and the default
    assert "torch 2.13.0" in text and "Step 3: PPO" in text and "SFT" in text and "iteration 17" in text
    assert tags.count("article") == 8 + 2 and tags.count("details") == 2 + 2
    titles = ("Loss", "Accuracy", "KL to the SFT model", "Entropy")
    assert [title for title in titles if title in tags.captions] == list(titles[:3])  # entropy was never finite
    assert "1:00" in text and "3:00" in text and "load, evaluate, save 129 s" in text  # 180 s less 17 times 3


def test_what_people_prefer_stands_there(tags, tmp_path):
    text = " ".join(tags.text.split())
    assert "What people prefer No difference is shown: report <run>/rlhf wins against report <run>/sft in 83.3%" in text
    assert "report <run>/rlhf preferred to report <run>/sft by <b>ann</b> 75.0% (" in text
    assert "3 preferences (<b>ann</b> 2, ben 1): 33% about the same, 0% both bad" in text
    assert "<b>ann</b> and ben say the same of 100.0%" in text
    assert "What people prefer" not in Tags(render(make_run(tmp_path, evaluated=False))).text


def test_a_damaged_file_of_preferences_is_said_and_the_report_is_there(tmp_path, capsys):
    run = make_run(tmp_path)
    run.preferences.write_text("{}\n")
    assert "What people prefer" not in render(run)
    assert "no file of preferences (line 1: " in capsys.readouterr().err


def test_what_was_predicted_stands_beside_what_was_achieved(tags, tmp_path):
    text = " ".join(tags.text.split())
    assert "actor train 4 5 -20%" in text and "Iteration 17 what each rank did when" in text
    assert "actor_train: 0.500 to 4.500 s" in text and "actor_train: 0.250 to 5.250 s" in text
    assert "critic_train: 0.250 to 2.250 s" in text and "reallocation: 0.000 to 0.500 s" in text
    legend = text[text.index("critic_train: 0.250") :]
    assert "reallocation" in legend and "reward_score" not in legend
    run = make_run(tmp_path)
    run.step(PPO).iteration_file.write_text(json.dumps({"iteration": 17, "achieved": [[]], "predicted": [[]]}))
    fused = Tags(render(run)).text
    assert "actor train" in fused and "what each rank did when" not in fused
    run.step(PPO).metrics_file.write_text(lines([{"number": 1, "reward/score_mean": 0.1}]))
    assert "Predicted and achieved" not in Tags(render(run)).text


def test_tokens_of_the_newest_samples_are_coloured_by_kl_or_by_advantage(page, report, tags):
    text = " ".join(tags.text.split())
    assert "Samples of iteration 17" in text and "sample 1 · reward 0.25 (score 0.50, KL penalty -0.25)" in text
    assert text.index("sample 1 ·") < text.index("sample 0 ·")  # the one with the lowest reward first
    assert "token KL advantage" in text and "\\n -0.70 1.00" in text
    page.goto(report.as_uri())
    first = page.locator(".rollouts article").first.locator(".text span")
    seen = """nodes => nodes.map(node => getComputedStyle(node)).map(
        style => [style.backgroundColor, style.textDecorationStyle])"""
    clear, dotted = "rgba(0, 0, 0, 0)", "dotted"
    by_kl = first.evaluate_all(seen)
    assert [colour == clear for colour, _ in by_kl] == [True, False, False, False]
    assert [line == dotted for _, line in by_kl] == [False, True, False, False]
    assert len({colour for colour, _ in by_kl}) == 4
    page.get_by_label("colour by advantage").check()
    by_advantage = first.evaluate_all(seen)
    assert [colour == clear for colour, _ in by_advantage] == [False, False, True, False]
    assert [line == dotted for _, line in by_advantage] == [True, False, False, False]
    assert first.nth(1).get_attribute("title") == "KL -0.70, advantage +1.00"


def test_the_better_answer_is_marked(tags):
    classes = [attributes.get("class", "") for _, attributes in tags.tags]
    assert classes.count("answer rlhf better") == 8 and classes.count("answer sft") == 8


@pytest.mark.parametrize(
    ("rlhf", "expected"),
    [
        ({}, set()),
        ({"kl": 56.0}, {"KL: 56.00 nats a reply from SFT (at most 6)"}),
        ({"kl": 9.0, "length": 15.0}, {"KL: 9.00 nats a reply from SFT (at most 6)"}),
        (
            {"perplexity_untouched": 1.5e6},
            {"Perplexity under the untouched model: 5.0e+04 times that of SFT (at most 1.3)"},
        ),
        ({"length": 18.0}, {"Length of answers: 1.50 times that of SFT (0.7 to 1.3)"}),
        ({"distinct_bigrams": 0.3}, {"Variety (distinct bigrams): 0.50 times that of SFT (at least 0.8)"}),
        ({"most_frequent_share": 0.2}, {"Most frequent answer: 20.0% of all (at most 3%)"}),
        ({"true_score": 0.2}, {"The learned reward rose, the score of the lexicon did not"}),
    ],
)
def test_signs_of_a_fooled_judge_stand_out(tmp_path, rlhf, expected):
    run = make_run(tmp_path, rlhf=rlhf)
    text = render(run)
    for sentence in expected:
        assert "Out of bounds" in text and text.index(sentence) < text.index("RLHF beats SFT")
    assert {each.text for each in signs(run, run.read_comparison(PPO)) if not each.is_good} == expected


def test_under_the_sft_model_perplexity_guards_nothing(tmp_path):
    run = make_run(tmp_path)
    file = run.comparison_of(PPO)[0]
    file.write_text(file.read_text().replace("perplexity_untouched", "perplexity_sft_model"))
    texts = [each.text for each in signs(run, run.read_comparison(PPO))]
    assert any(text.startswith("Variety") for text in texts) and not any("erplexity" in text for text in texts)


def test_an_answer_given_once_is_no_collapse_however_few_the_prompts(tmp_path):
    run = make_run(tmp_path, rlhf={"most_frequent_share": 0.1})
    evaluation = json.loads(run.comparison_of(PPO)[0].read_text())
    for prompts, good in ((10, True), (20, False)):
        run.comparison_of(PPO)[0].write_text(json.dumps(evaluation | {"prompts": prompts}))
        sign = next(each for each in signs(run, run.read_comparison(PPO)) if each.text.startswith("Most frequent"))
        assert sign.is_good == good


def test_the_accuracy_is_the_one_measured_last_whoever_trained_the_reward_model(tmp_path):
    run = make_run(tmp_path)
    evaluation = run.read_comparison(PPO)
    assert reward_accuracy(run, evaluation) == (0.81, 0)
    measured = {"all": {"pairs": 9, "rate": 0.5, "low": 0.3, "high": 0.7}}
    shutil.rmtree(run.step(REWARD).path)
    assert reward_accuracy(run, evaluation) is None
    found = signs(run, {**evaluation, "reward_accuracy": measured})
    assert [each.is_good for each in found if "Reward model right in 50.0% of 9 held-out pairs" in each.text] == [False]


def test_a_half_finished_run_has_a_report_too(tmp_path):
    run = make_run(tmp_path, evaluated=False)
    shutil.rmtree(run.step(PPO).path)
    run.step(REWARD).result_file.unlink()
    text = render(run)
    assert text == render(run)
    assert "(not finished)" in text and "Step 3: PPO" not in text and "held-out prompts get" not in text


def test_a_run_without_a_step_and_a_place_that_cannot_be_written_are_sentences(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        write_report(run, tmp_path / "nowhere" / "report.html")
    assert write_report(run) == run.path / "report.html"
    for step in METHODS["ppo"]:
        shutil.rmtree(run.step(step).path)
    with pytest.raises(UserError, match="Nothing was trained"):
        render(run)


MEASURE = r"""() => {
  document.querySelectorAll("details").forEach(details => details.open = true);
  const root = document.documentElement, charts = [...document.querySelectorAll("svg.chart")];
  const texts = chart => [...chart.querySelectorAll("text")];
  const shown = chart => texts(chart).filter(text => getComputedStyle(text).visibility === "visible");
  const isApart = (a, b) =>
    a.right < b.left + 1 || b.right < a.left + 1 || a.bottom < b.top + 4 || b.bottom < a.top + 4;
  const overlaps = chart => shown(chart).flatMap((text, place, all) => all.slice(place + 1)
    .filter(other => !isApart(text.getBoundingClientRect(), other.getBoundingClientRect()))
    .map(other => `${text.textContent} | ${other.textContent}`));
  const isOutside = text => {
    const box = text.getBBox();
    return box.x < 0 || box.x + box.width > 344 || box.y < -2 || box.y + box.height > 200;
  };
  const split = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    for (const found of node.data.matchAll(/[-+]?\d[\d.,:%e+-]*( s\b|[kMG]\b)?/g)) {
      const range = document.createRange();
      range.setStart(node, found.index);
      range.setEnd(node, found.index + found[0].length);
      if (new Set([...range.getClientRects()].filter(box => box.width).map(box => Math.round(box.top))).size > 1)
        split.push(found[0]);
    }
  }
  const drawn = charts.flatMap(chart => [...chart.querySelectorAll(":is(path, text, use):not(defs *)")]);
  return {
    charts: charts.length,
    over: root.scrollWidth - root.clientWidth,
    padding: getComputedStyle(document.body).paddingLeft,
    outside: charts.flatMap(texts).filter(isOutside).map(text => text.textContent),
    overlaps: charts.flatMap(overlaps),
    split,
    smallest: Math.min(...charts.flatMap(chart => shown(chart).map(
      text => parseFloat(getComputedStyle(text).fontSize) * chart.getBoundingClientRect().width / 340))),
    colours: drawn.map(each => getComputedStyle(each)).flatMap(style => [style.fill, style.stroke])
      .filter(colour => colour !== "none"),
  };
}"""


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[place : place + 2], 16)) for place in (1, 3, 5))})"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_lays_it_out_at_every_width_and_asks_for_nothing(page, complaints, report, scheme):
    """Style applied, nothing wider than the page, labels legible and apart, numbers whole, nothing run or fetched."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.emulate_media(color_scheme=scheme)
    for width, padding in ((360, "12px"), (390, "12px"), (1240, "20px")):
        page.set_viewport_size({"width": width, "height": 800})
        page.goto(report.as_uri())
        found = page.evaluate(MEASURE)
        assert page.title() == "report <run>: rlhf-chat report"
        assert found["charts"] == 10 and found["padding"] == padding and found["over"] == 0
        assert found["outside"] == found["overlaps"] == found["split"] == []
        assert found["smallest"] > 10
        assert set(found["colours"]) <= {rgb(colour) for colour in schemes()[scheme == "dark"].values()}
    assert set(asked) == {report.as_uri()} and complaints == []


def test_values_show_under_the_pointer(page, report):
    page.goto(report.as_uri())
    chart = page.locator("svg.chart").first
    value, key = chart.locator(".hit text").nth(3), chart.locator(".key text").first
    expect(value).to_be_hidden()
    expect(key).to_be_visible()
    chart.locator(".hit rect").nth(3).hover()
    expect(value).to_be_visible()
    expect(key).to_be_hidden()


def test_what_was_trained_elsewhere_is_said(tmp_path):
    run = make_run(tmp_path)
    file = run.comparison_of(PPO)[0]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_elsewhere": ["<b> was trained on."]}))
    assert "<b> was trained on." in Tags(render(run)).text


def test_warnings_are_repeated_once_and_each_step_has_the_versions_that_ran_it(tmp_path):
    run = make_run(tmp_path)
    run.step(PPO).log_file.write_text("Warning: it went astray\na library spoke\nWarning: it went astray\n")
    start = {
        "number": 1,
        "time": "2026-11-30T09:00:00+00:00",
        "processor": "p",
        "gpus": [],
        "commit": "c" * 40,
        "changed_since_commit": True,
    }
    ran = [
        start | {"what": step, "versions": {"torch": v}} for step, v in (("step1_sft", "2.13.0"), ("step3_rlhf", "3"))
    ]
    run.starts_file.write_text(lines(ran))
    text = " ".join(Tags(render(run)).text.split())
    assert text.count("Step 3: PPO: it went astray") == 1 and "a library spoke" not in text
    assert "step1_sft step3_rlhf torch 2.13.0 3" in text and "c" * 12 + " (changed)" in text
