"""The chat page as a user meets it: in headless Chromium, over a server whose answers are known.

With $CHAT_PICTURES a folder gets what the page looks like.
"""

import base64
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_gmai.evaluate.server.app import Settings
from tests.evaluate.browser import CHROMIUM, Page, browsing
from tests.evaluate.serving import Reader, serving
from tests.evaluate.tables import encoded, png

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
TURNS = "[...document.querySelectorAll('.turn')].map(turn => turn.innerText.trim())"
ANSWERED = "!document.getElementById('send').disabled"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("examples")
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
    reader = Reader(0.05)
    with (
        serving(reader, Settings(examples=folder, most_tokens=100_000)) as address,
        browsing(address, tmp_path_factory.mktemp("profile")) as page,
    ):
        page.view(1100, 800)
        page.wait("document.querySelectorAll('#examples button').length === 3")
        yield page
        assert not page.errors


@pytest.fixture(autouse=True)
def empty(page: Page) -> None:
    page.run("document.getElementById('again').click()")
    page.run("document.querySelectorAll('#images button').forEach(button => button.click())")


def photograph(page: Page, name: str) -> None:
    if folder := os.environ.get("CHAT_PICTURES"):
        page.picture(Path(folder) / f"{name}.png")


def say(page: Page, text: str) -> None:
    page.run(f"document.getElementById('text').value = {text!r}")
    page.run("document.getElementById('send').click()")


def level(page: Page) -> int:
    """The mean of the waiting image, as the page shows it."""
    return page.run(
        """(async () => {
            const image = document.querySelector('#images img');
            await image.decode();
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            const {data} = context.getImageData(0, 0, canvas.width, canvas.height);
            return Math.round(data.filter((_, i) => i % 4 === 0).reduce((a, b) => a + b) /
                (canvas.width * canvas.height));
        })()"""
    )


def test_it_says_that_it_is_no_medical_device(page: Page) -> None:
    assert "This is not a medical device" in page.run("document.body.innerText")
    assert page.run("document.getElementById('model').innerText") == "reader"


def test_two_uploads_a_streamed_answer_and_a_follow_up(page: Page, tmp_path: Path) -> None:
    files = [tmp_path / f"{grey}.png" for grey in (7, 99)]
    for file, grey in zip(files, (7, 99), strict=True):
        file.write_bytes(encoded(Image.new("RGB", (40, 30), (grey,) * 3)))
    page.choose_files("#files", *files)
    page.wait("document.querySelectorAll('#images figure').length === 2")
    say(page, "is one of these two a scan of the chest or is neither of them one")
    # Streamed: parts of the answer are there before its end.
    page.wait(f"({TURNS})[1]?.includes('is one')")
    assert "images=7,99" not in page.run(TURNS)[1]
    page.wait(ANSWERED)
    assert page.run(TURNS)[1].endswith("turns=1 images=7,99")
    say(page, "and now")
    page.wait(f"({TURNS}).length === 4 && {ANSWERED}")
    assert page.run(TURNS)[3] == "and now turns=3 images=7,99"
    photograph(page, "talk")
    page.view(390, 780, dark=True)
    assert page.run("document.documentElement.scrollWidth <= 390")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.run(background) == "rgb(18, 22, 26)"
    photograph(page, "phone-dark")
    page.view(1100, 800)
    assert page.run(background) == "rgb(243, 245, 247)"


def test_a_new_conversation_ends_an_answer_and_begins_without_it(page: Page) -> None:
    say(page, "this goes on forever")
    page.wait(f"({TURNS})[1]?.includes('again')")
    page.run("document.getElementById('again').click()")
    page.wait(ANSWERED)
    say(page, "next")
    page.wait(f"({TURNS})[1]?.includes('turns') && {ANSWERED}")
    assert page.run(TURNS) == ["next", "next turns=1 images="]


def test_a_question_without_an_answer_can_be_sent_again(page: Page) -> None:
    page.run("document.querySelector('#examples button').click()")
    assert not page.run(ANSWERED)  # not before its image is there
    page.wait(f"document.querySelectorAll('#images figure').length === 1 && {ANSWERED}")
    say(page, "fail-later")
    page.wait("document.getElementById('problem').innerText.includes('failed')")
    page.wait(ANSWERED)
    assert page.run(TURNS) == []
    assert page.run("document.getElementById('text').value") == "fail-later"
    assert page.run("document.querySelectorAll('#images figure').length") == 1
    page.run("document.getElementById('text').value = ''")


def test_a_pasted_image_is_added(page: Page) -> None:
    data = base64.b64encode(encoded(Image.new("RGB", (20, 20), (60,) * 3))).decode()
    page.run(
        f"""(async () => {{
            const bytes = Uint8Array.from(atob('{data}'), (c) => c.charCodeAt(0));
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([bytes], 'pasted.png', {{type: 'image/png'}}));
            document.dispatchEvent(new ClipboardEvent('paste', {{clipboardData}}));
        }})()"""
    )
    page.wait("document.querySelectorAll('#images figure').length === 1")
    assert level(page) == 60
    assert page.run("document.querySelectorAll('#images input').length") == 0


def test_deep_images_have_a_window_that_can_be_moved(page: Page, tmp_path: Path) -> None:
    from pydicom.data import get_testdata_file

    deep = np.linspace(0, 4000, 10_000).astype(np.uint16).reshape(100, 100)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    page.choose_files("#files", Path(str(get_testdata_file("CT_small.dcm"))))
    page.wait("document.querySelectorAll('#images figure').length === 1")
    assert page.run("document.querySelectorAll('#images input[type=range]').length") == 2
    photograph(page, "dicom")
    page.run("document.querySelector('#images button').click()")
    page.choose_files("#files", tmp_path / "deep.png")
    page.wait("document.querySelectorAll('#images figure').length === 1")
    assert 125 <= level(page) <= 130
    page.run("window.shown = document.querySelector('#images img').src")
    page.run(
        """(() => {
            const low = document.querySelector('#images input');
            low.value = 3000;
            low.dispatchEvent(new Event('change'));
        })()"""
    )
    page.wait("document.querySelector('#images img').src !== window.shown")
    moved = level(page)
    assert 25 <= moved <= 45  # black up to 3000 of 4000
    photograph(page, "window")
    say(page, "what is it")
    page.wait(f"({TURNS}).length === 2 && {ANSWERED}")
    (seen,) = page.run(TURNS)[1].split("images=")[1].split(",")
    assert abs(int(seen) - moved) <= 1  # the model gets what the page shows


def test_an_example_is_added_and_what_is_no_image_is_told(page: Page, tmp_path: Path) -> None:
    page.run("document.querySelector('#examples button').click()")
    page.wait("document.querySelectorAll('#images figure').length === 1")
    (tmp_path / "notes.png").write_text("no image")
    page.choose_files("#files", tmp_path / "notes.png")
    page.wait("document.getElementById('problem').innerText.includes('notes.png')")
    page.errors = [error for error in page.errors if "400" not in error]
    photograph(page, "example")
