"""The report of a real run that was killed, resumed and given samples that it cannot use."""

import json
import re
import shutil
import subprocess
from collections import Counter
from html import escape
from pathlib import Path

import pytest

from megatron_gmai.data.ledger import Rejection, read_ledger
from megatron_gmai.data.prepare import copy_tokenizer
from megatron_gmai.data.shards.build import build_shards
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.report.charts import TOP, Line, Mark, Scale, chart, number
from megatron_gmai.report.read import read_runs
from megatron_gmai.report.rejected import by_reason, find_sample
from megatron_gmai.report.times import planned_mfu
from tests.data.world import mixed_records, record
from tests.training.command import STEPS, losses, start, trained, wait_for_step
from tests.training.faulty import SLOW, faulty
from tools import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip


@pytest.fixture(scope="module")
def work_dir(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed after step 5, whose newest checkpoint was of step 3, and resumed; of 26 samples one
    has too many tags and one is too long."""
    folder = tmp_path_factory.mktemp("report")
    records = mixed_records(folder, 24)
    records.insert(7, record("<image><image>what", "no", "1.png", id="tags"))
    records.insert(9, record("<image>" + "what is shown here " * 400, "no", "2.png", id="long"))
    (folder / "samples.json").write_text(json.dumps(records))
    entry = {"image_dir": str(folder), "annotations": "samples.json", "sample_ratio": 1.0}
    (folder / "LIST.json").write_text(json.dumps({"<b>samples": entry}))
    build_shards(folder / "LIST.json", folder / "shards")
    copy_tokenizer(shards / "tokenizer.model", folder / "shards")
    flags = ("--max-rejected", "0.5")
    program = faulty(folder / "program.py", SLOW)
    process = start(folder / "shards", folder / "work", 1, *flags, program=program)
    wait_for_step(process, folder / "work", 5)
    process.kill()
    process.wait()
    output = trained(folder / "shards", folder / "work", 1, *flags, "--resume")
    assert list(losses(folder / "work")) == list(range(1, STEPS + 1)), output
    return folder / "work"


@pytest.fixture(scope="module")
def page(work_dir: Path) -> str:
    assert report.main([str(work_dir)]) == 0
    return (work_dir / "report.html").read_text()


def test_attempts_keep_the_steps_that_a_restart_took_back(work_dir: Path) -> None:
    (run,) = read_runs(work_dir)
    first, second = run.attempts
    assert (first.first, second.first, second.last) == (1, 4, STEPS)
    assert first.last >= 5
    assert {step: loss for step, loss in second.losses.items()} == pytest.approx(
        {step: loss for step, (loss, _) in losses(work_dir).items() if step >= 4}
    )


def test_the_page_shows_restarts_and_what_they_took_back(page: str, work_dir: Path) -> None:
    (run,) = read_runs(work_dir)
    assert page.count('class="lost"') == 1  # on the loss's chart
    assert page.count("work starts again at 4") == page.count("<figure>") == 9
    taken_back = run.attempts[0].last - 3
    assert re.search(rf"<td>1 to {run.attempts[0].last}<td>{taken_back}<td>\d+ s<", page)
    assert "<span>restarts</span><b>1</b>" in page
    assert "train.global_batch_size<td>2" in page
    assert "megatron-core<td>" in page


def test_rejected_samples_stand_by_reason_with_pictures_where_there_are_some(
    page: str, work_dir: Path
) -> None:
    reasons = {reason.text for reason in by_reason(read_ledger(work_dir / "rejected.jsonl"))}
    assert len(reasons) == 2
    assert all(escape(reason) in page for reason in reasons)
    # The one with too many tags never came into the shards.
    assert page.count("<img src=") == 1
    assert re.search('title="_b_samples-[0-9a-f]+-00000.tar@[0-9]+"', page)
    assert "<td>&lt;b&gt;samples 1<td>" in page and "<b>samples" not in page


def test_a_sample_is_found_by_its_key(work_dir: Path) -> None:
    shards = Shards(work_dir.parent / "shards")
    for row in range(len(shards)):
        found = find_sample(shards, Rejection(shards.location(row), "<b>samples", ""))
        assert found is not None and found.key == shards.read(row).key
    absent = ("_b_samples/00000007", "000.tar@0", f"{shards.location(0)}1", "other@x")
    for key in absent:
        assert find_sample(shards, Rejection(key, "<b>samples", "")) is None


def test_the_page_loads_nothing_from_outside(page: str) -> None:
    assert not re.search(r"<script|<link|https?://|url\(", page)


def test_several_runs_stand_on_one_axis(work_dir: Path, tmp_path: Path) -> None:
    for name in ("phase1", "phase2"):
        shutil.copytree(work_dir, tmp_path / name)
    assert report.main([str(tmp_path), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("phase2 begins") == 9
    assert ">20</text>" in page  # steps of both


def test_a_folder_without_runs_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "give the --work-dir of a run" in capsys.readouterr().err


def test_a_run_that_is_still_writing_is_read(work_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(work_dir, tmp_path / "work")
    with (tmp_path / "work" / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 11, "loss"')
    (run,) = read_runs(tmp_path / "work")
    assert run.last_step == STEPS


def test_validation_and_steps_that_stand_out_are_shown(work_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(work_dir, tmp_path / "work")
    rows = [
        {"iteration": step, "data_set": name, "loss": 9 / step, "samples": 7}
        for step in (2, 4)
        for name in ("<a>", "b")
    ]
    for name, lines in (
        ("valid", rows),
        ("skipped", [{"iteration": 3, "reason": "the loss is nan", "keys": ["k1", "k2"]}]),
        ("spikes", [{"iteration": 5, "loss": 9.0, "median": 2.0, "keys": [*"abcd"]}]),
    ):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "work" / f"{name}.jsonl").write_text(text)
    assert report.main([str(tmp_path / "work")]) == 0
    page = (tmp_path / "work" / "report.html").read_text()
    assert page.count("<figure>") == 10
    assert "<td>&lt;a&gt;<td>7<td>4<td>4.5<td>2.25<td>2.25" in page
    assert "<td>3<td>skipped: the loss is nan<td>k1, k2<td>2" in page
    assert "<td>5<td>spike: 9, median 2<td>a, b, c<td>4" in page


def test_the_parts_of_a_step_stand_by_stage_and_mfu_beside_the_plan(
    work_dir: Path, tmp_path: Path, page: str
) -> None:
    assert page.count("<div class=bar>") == 1  # of a run without pipeline stages
    shutil.copytree(work_dir, tmp_path / "work")
    parts = {"compute": 0.5, "pipeline": 0.25, "reduce": 0.125, "data": 0.0}
    rows = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"mfu": 0.4, "step_time_s": 1.0, "stragglers": [3] if row["iteration"] > 8 else []}
        row["stages"] = [{"stage": stage, **parts} for stage in range(2)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "work" / "metrics.jsonl").write_text(lines)
    start = {"processes": 2, "gpus": "2 x NVIDIA H100 80GB HBM3"}
    (tmp_path / "work" / "environment.jsonl").write_text(json.dumps(start) + "\n")
    (run,) = read_runs(tmp_path / "work")
    expected = planned_mfu(run)
    assert expected is not None and 0 < expected < 0.7
    assert planned_mfu(read_runs(work_dir)[0]) is None
    assert report.main([str(tmp_path / "work")]) == 0
    drawn = (tmp_path / "work" / "report.html").read_text()
    assert drawn.count("<div class=bar>") == 2
    assert drawn.count('class=pipeline style="width:25.00%"') == 2
    assert drawn.count('class=rest style="width:12.50%"') == 2
    assert "rank 3 in 2 of 10" in drawn
    assert drawn.count('class="plan"') == 1


MEASURE = """<!doctype html><iframe style="width:{width}px;height:900px;border:0"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, body = frame.contentWindow.getComputedStyle(page.body);
  document.title = JSON.stringify({{
    wide: page.documentElement.scrollWidth, room: page.documentElement.clientWidth,
    pictures: [...page.images].map(image => image.naturalWidth),
    charts: [...page.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().width),
    letters: Math.min(...[...page.querySelectorAll("svg text")].filter(text => text.textContent)
      .map(text => text.getBoundingClientRect().height)),
    background: body.backgroundColor, color: body.color}});
}};
frame.srcdoc = {page};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_on_a_phone_and_in_the_dark(
    width: int, dark: bool, page: str, tmp_path: Path
) -> None:
    quoted = json.dumps(page).replace("</", "<\\/")
    (tmp_path / "measure.html").write_text(MEASURE.format(width=width, page=quoted))
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    command += [
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--window-size=1400,1000",
    ]
    command += [(tmp_path / "measure.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search("<title>(.*?)</title>", done.stdout)
    assert found is not None, done.stderr[-2000:]
    seen = json.loads(found[1])
    assert seen["wide"] == seen["room"] <= width  # nothing to scroll sideways for
    assert all(size > 0 for size in seen["pictures"]) and len(seen["pictures"]) == 1
    assert len(seen["charts"]) == 9 and min(seen["charts"]) > 280
    assert seen["letters"] >= 9
    brightness = {
        name: sum(map(int, re.findall(r"\d+", seen[name])[:3])) / 3
        for name in ("background", "color")
    }
    assert (brightness["background"] < 50) == dark
    assert abs(brightness["background"] - brightness["color"]) > 150


class TestCharts:
    def test_no_spike_is_lost_among_many_steps(self) -> None:
        points = [(float(step), 50.0 if step == 77_777 else 1.0) for step in range(100_000)]
        drawn = chart("loss", [Line(points)], may_be_log=False)
        assert len(drawn) < 20_000
        heights = [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)V", drawn)]
        assert min(heights) < TOP + 10
        assert Counter(round(y) for y in heights).most_common(1)[0][1] > 200

    def test_values_that_are_not_finite_are_left_out(self) -> None:
        drawn = chart("loss", [Line([(1, 1.0), (2, float("nan")), (3, 2.0)])])
        assert "nan" not in drawn and drawn.count(",") == 2
        assert chart("loss", [Line([(1, float("inf"))])]) == ""

    def test_a_mark_stands_where_its_step_is(self) -> None:
        drawn = chart("loss", [Line([(0, 1.0), (100, 2.0)])], [Mark(100, "restart", "<here>")])
        assert 'class="restart" d="M354.0' in drawn and "&lt;here&gt;" in drawn

    @pytest.mark.parametrize(
        "values", [(1.0, 2.0), (0.0, 0.0), (-3.0, 5.0), (1e-8, 1.0), (96.9, 97.3), (7.0, 7.0)]
    )
    def test_an_axis_has_round_values_in_its_range(self, values: tuple[float, float]) -> None:
        scale = Scale.of(values, may_be_log=True)
        assert 2 <= len(scale.ticks()) <= 10
        assert all(0 <= scale.fraction(value) <= 1 for value in (*values, *scale.ticks()))

    def test_numbers_are_short(self) -> None:
        numbers = [0, 0.00012, 0.5, 1234.5, 12345, 2.5e6, 7e9, 3e12]
        told = ["0", "1.2e-04", "0.5", "1234", "12.3k", "2.5M", "7G", "3T"]
        assert [number(value) for value in numbers] == told
