"""The page from files made by hand: what it shows, that it is inert, and how a real browser lays it out."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import yaml

from applications.report.page import render, reward_accuracy, signs, write_report
from inference.errors import UserError
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
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


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
    run.step(SFT).metrics_file.write_text(
        lines([{"number": n, "loss": 4 - n / 50, "time/train": 0.5, "tokens_per_second": 900.0} for n in range(1, 100)])
        + lines([{"number": 99, "eval/loss": 2.2, "eval/perplexity": 9.0}])
    )
    run.step(REWARD).metrics_file.write_text(lines([{"number": n, "loss": 0.6, "accuracy": 0.7} for n in range(9)]))
    ppo = {"reward/score_std": 0.5, "kl/reference": 1.5, "response/length_mean": 14.0, "time/generate": 3.0}
    run.step(PPO).metrics_file.write_text(
        lines([{"number": n, "reward/score_mean": n / 10, "policy/entropy": float("nan"), **ppo} for n in range(1, 18)])
    )
    run.step(PPO).samples_file.write_text(
        lines([{"number": n, "prompt": attack, "response": f"{attack} {n}"} for n in (0, 8, 17)])
    )
    (run.step(PPO).path / "first_update.json").write_text(json.dumps({"ratio_error": 1e-7, "kl_old": 0.0}))
    if evaluated:
        rlhf = {**MEASURES, "learned_reward": 1.5, "true_score": 0.7, "kl": 2.5, **(rlhf or {})}
        sampling = {"temperature": 0.8, "max_tokens": 32}
        result = {"prompts": 40, "sampling": sampling, "sft": MEASURES, "rlhf": rlhf, "win_rate": WIN}
        run.comparison_of(PPO)[0].write_text(json.dumps(result))
        prompt = [{"role": "system", "content": attack}, {"role": "user", "content": "Hi"}]
        answers = {"prompt": prompt, "sft": attack, "rlhf": LONG, "sft_score": 0.25, "rlhf_score": 0.5}
        run.comparison_of(PPO)[1].write_text(lines([answers] * 12))
    return run


class Page(HTMLParser):
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


def test_what_a_model_said_is_text_and_nothing_else(tmp_path):
    page = Page(render(make_run(tmp_path)))
    assert ATTACK in page.text and "report <run>" in page.text
    assert page.count("script") == page.count("img") == page.count("link") == page.count("a") == 0
    names = {name for _, attributes in page.tags for name in attributes}
    assert not {name for name in names if name.startswith("on")} and not names & {"src", "href", "style"}
    (policy,) = (a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-")


def test_everything_has_its_place(tmp_path):
    page = Page(render(make_run(tmp_path)))
    text = " ".join(page.text.split())
    assert "75.0% of 40 held-out prompts get the better answer from RLHF, not SFT, by upbeat score." in text
    assert "75.0% (61.0% to 89.0%)" in text and "KL to SFT (nats a reply) 0.00 2.50" in text
    assert "seed 7 1" in text  # what differs from the default, and the default
    assert "torch 2.13.0" in text and "Step 3: PPO" in text and "SFT" in text and "iteration 17" in text
    assert page.count("article") == 8 and page.count("details") == 2
    titles = ("Loss", "Accuracy", "KL to the SFT model", "Entropy")
    assert [title for title in titles if title in page.captions] == list(titles[:3])  # entropy was never finite
    assert "1:00" in text and "3:00" in text and "load, evaluate, save 129 s" in text  # 180 s less 17 times 3


def test_the_better_answer_is_marked(tmp_path):
    page = Page(render(make_run(tmp_path)))
    classes = [attributes.get("class", "") for _, attributes in page.tags]
    assert classes.count("answer rlhf better") == 8 and classes.count("answer sft") == 8


@pytest.mark.parametrize(
    ("rlhf", "expected"),
    [
        ({}, set()),
        ({"length": 18.0}, {"Length of answers: 1.50 times that of SFT (0.7 to 1.3)"}),
        ({"distinct_bigrams": 0.3}, {"Variety (distinct bigrams): 0.50 times that of SFT (at least 0.8)"}),
        ({"most_frequent_share": 0.2}, {"Most frequent answer: 20.0% of all (at most 3%)"}),
        ({"true_score": 0.2}, {"The learned reward rose, the true score did not"}),
    ],
)
def test_signs_of_a_fooled_judge_stand_out(tmp_path, rlhf, expected):
    import re

    text = render(make_run(tmp_path, rlhf=rlhf))
    assert set(re.findall(r'<li class="bad">(.*?)</li>', text)) == expected


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
    assert reward_accuracy(run, evaluation) == 0.81
    measured = {"all": {"pairs": 9, "rate": 0.5, "low": 0.3, "high": 0.7}}
    shutil.rmtree(run.step(REWARD).path)
    assert reward_accuracy(run, evaluation) is None
    found = signs(run, {**evaluation, "reward_accuracy": measured})
    assert [each.is_good for each in found if "Reward model right in 50%" in each.text] == [False]


def test_a_half_finished_run_has_a_report_too(tmp_path):
    run = make_run(tmp_path, evaluated=False)
    shutil.rmtree(run.step(PPO).path)
    run.step(REWARD).result_file.unlink()
    text = render(run)
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


MEASURE = """
const pages = [...document.querySelectorAll('iframe')];
Promise.all(pages.map(page => new Promise(done => page.onload = done))).then(() => {
  document.body.textContent = JSON.stringify(pages.map(page => {
    const inside = page.contentDocument, root = inside.documentElement;
    const isOutside = text => {
      const box = text.getBBox();
      return box.x < 0 || box.x + box.width > 361 || box.y + box.height > 203;
    };
    return {
      title: inside.title,
      over: root.scrollWidth - root.clientWidth,
      charts: inside.querySelectorAll('svg.chart').length,
      outside: [...inside.querySelectorAll('svg.chart text')].filter(isOutside).map(text => text.textContent),
      asked: page.contentWindow.performance.getEntriesByType('resource').length,
      padding: page.contentWindow.getComputedStyle(inside.body).paddingLeft,
    };
  }));
});
"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed")
def test_a_browser_lays_it_out_at_every_width_and_asks_for_nothing(tmp_path):
    """Style applied, nothing wider than the page, labels inside their charts, no script run, nothing fetched."""
    report = write_report(make_run(tmp_path), tmp_path / "report.html")
    frames = "".join(f'<iframe src="{report.name}" width="{width}" height="800"></iframe>' for width in (360, 1240))
    (tmp_path / "measure.html").write_text(f"<body>{frames}<script>{MEASURE}</script>")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--virtual-time-budget=5000",
    ]
    done = subprocess.run(
        [
            str(BROWSER),
            *options,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            str(tmp_path / "measure.html"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = json.loads(Page(done.stdout).text)
    assert [page["title"] for page in found] == ["report <run>: rlhf-chat report"] * 2
    assert [page["padding"] for page in found] == ["12px", "20px"]  # the style sheet's, narrow and wide
    for page in found:
        assert page["over"] == 0 and page["outside"] == [] and page["asked"] == 0 and page["charts"] == 9
