"""The server's page, and the previews of uploaded images on it."""

import base64
import http.client
import io
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from megatron_gmai.data.images.decode import decode
from megatron_gmai.evaluate.server.app import Settings
from tests.evaluate.serving import Reader, serving
from tests.evaluate.tables import encoded
from tests.evaluate.test_server import raw


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(Reader()) as address:
        yield address


class TestPreview:
    def look(self, address: str, data: bytes, query: str = "") -> tuple[int, dict[str, Any]]:
        return raw(address, data, f"/preview{query}", Content_Type="application/octet-stream")

    def pixels(self, told: dict[str, Any]) -> np.ndarray:
        data = base64.b64decode(told["image"].split(",")[1])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def test_a_deep_image_is_windowed_as_in_training_and_can_be_windowed_anew(
        self, address: str
    ) -> None:
        deep = np.linspace(0, 4000, 10_000).astype(np.uint16).reshape(100, 100)
        data = encoded(Image.fromarray(deep))
        status, told = self.look(address, data)
        assert status == 200 and told["range"] == [0, 4000]
        assert told["window"] == pytest.approx([20, 3980], abs=1)
        assert (self.pixels(told) == decode(data)).all()
        _, told = self.look(address, data, "?low=1000&high=1400")
        moved = self.pixels(told)[..., 0]
        assert told["window"] == [1000, 1400]
        assert moved[20, 0] < 20 and moved[40, 0] > 235 and 100 < moved[30, 0] < 156

    def test_a_plain_image_has_no_window(self, address: str) -> None:
        status, told = self.look(address, encoded(Image.new("RGB", (9, 5), (1, 2, 3))))
        assert status == 200 and told["window"] is None and self.pixels(told).shape == (5, 9, 3)

    def test_a_dicom_file_is_shown_in_its_own_window(self, address: str) -> None:
        from pydicom.data import get_testdata_file

        path = get_testdata_file("CT_small.dcm")
        assert isinstance(path, str)
        with open(path, "rb") as file:
            data = file.read()
        status, told = self.look(address, data)
        assert status == 200 and told["range"][0] < told["window"][0] < told["window"][1]
        _, moved = self.look(address, data, "?low=0&high=200")
        assert (self.pixels(told) == decode(data)).all()
        assert (self.pixels(moved) != self.pixels(told)).any()

    @pytest.mark.parametrize(
        "query", ["?low=1", "?low=2&high=1", "?low=a&high=b", "?low=nan&high=1"]
    )
    def test_a_window_that_is_none_is_refused(self, address: str, query: str) -> None:
        deep = np.arange(100, dtype=np.uint16).reshape(10, 10)
        assert self.look(address, encoded(Image.fromarray(deep)), query)[0] == 400

    def test_files_that_are_no_images_are_refused(self, address: str) -> None:
        for data in (b"", b"text", b"\0" * 128 + b"DICM" + b"\1" * 50):
            assert self.look(address, data)[0] == 400


class TestThePage:
    def get(self, address: str, path: str) -> tuple[int, str, str]:
        place = urlsplit(address)
        connection = http.client.HTTPConnection(place.hostname or "", place.port)
        connection.request("GET", path)
        answer = connection.getresponse()
        return (
            answer.status,
            answer.headers.get("Content-Security-Policy", ""),
            answer.read().decode("utf-8", "replace"),
        )

    def test_it_says_that_it_is_no_medical_device_and_loads_nothing_from_elsewhere(
        self, address: str
    ) -> None:
        status, policy, page = self.get(address, "/")
        assert status == 200 and "not a medical device" in page and "default-src 'self'" in policy
        for path in ("/", "/chat.js", "/chat.css"):
            status, _, text = self.get(address, path)
            assert status == 200 and "http://" not in text and "https://" not in text

    def test_examples_come_from_their_folder_alone(self, tmp_path: Any) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.png").write_bytes(encoded(Image.new("L", (4, 4))))
        (tmp_path / "secret.png").write_bytes(b"secret")
        (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
        with serving(Reader(), Settings(examples=tmp_path / "in")) as address:
            assert json.loads(self.get(address, "/examples")[2]) == ["a.png"]
            assert self.get(address, "/examples/a.png")[0] == 200
            for name in ("link.png", "..%2Fsecret.png", "../secret.png", "none"):
                assert self.get(address, f"/examples/{name}")[0] == 404
