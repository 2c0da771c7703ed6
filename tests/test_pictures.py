"""Pictures: whatever the file, code, model, endpoint and page see the same RGB. Real files, real child processes."""
import io
import json
import random
import struct
import sys
import zlib
from base64 import b64decode
from pathlib import Path

import pytest
from PIL import Image, ImageOps, features

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.endpoint import chat_messages  # noqa: E402
from data.report import _embed  # noqa: E402
from data.tasks import load_tasks  # noqa: E402
from model import encode_image, load_policy  # noqa: E402
from rollout import Rollout, _load_image  # noqa: E402
from tools import MAX_PICTURE, OUTPUT, CodeTool, open_picture, to_rgb  # noqa: E402

SIZE = (40, 32)
UNLOCKED = sys.platform != "linux"


@pytest.fixture(scope="module")
def policy():
    return load_policy(ROOT / "data" / "model")


@pytest.fixture(scope="module")
def tool():
    with CodeTool(workers=1, timeout=20.0, unlocked=UNLOCKED) as code_tool:
        yield code_tool


def chunk(kind, data):
    return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))


def png(bits, colour, left, right, extra=b"", size=SIZE):
    """The bytes of a PNG whose left and right halves have these bytes a pixel."""
    row = b"\0" + left * (size[0] // 2) + right * (size[0] // 2)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack("!IIBBBBB", *size, bits, colour, 0, 0, 0)) + extra
            + chunk(b"IDAT", zlib.compress(row * size[1])) + chunk(b"IEND", b""))


def halves(mode, left, right):
    made = Image.new(mode, SIZE, left)
    made.paste(right, (SIZE[0] // 2, 0, *SIZE))
    return made


def saved(image, kind, **options):
    image.save(data := io.BytesIO(), kind, **options)
    return data.getvalue()


def numbers(mode, left, right):
    """A TIFF of 32-bit numbers."""
    row = struct.pack("<ff" if mode == "F" else "<ii", left, right)
    row = row[:4] * (SIZE[0] // 2) + row[4:] * (SIZE[0] // 2)
    return saved(Image.frombytes(mode, SIZE, row * SIZE[1]), "TIFF")


def sixteen(order, left, right):
    row = struct.pack(order + "HH", left, right)
    return Image.frombytes("I;16" + "B" * (order == ">"), SIZE, (row[:2] * (SIZE[0] // 2) + row[2:] * (SIZE[0] // 2)) * SIZE[1])


def palette(kind="PNG", **options):
    made = halves("P", 1, 2)
    made.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
    return saved(made, kind, **options)


WHITE, SHADES = (255,) * 3, ((128,) * 3, (32,) * 3)
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", SIZE, "blue")], "duration": 50}
FILES = {  # what a file holds -> its bytes, the RGB of its left and right half
    "16-bit grey PNG": (png(16, 0, b"\x80\0", b"\x20\0"), SHADES),
    "16-bit grey PNG, its right transparent": (png(16, 0, b"\x80\0", b"\x20\0", chunk(b"tRNS", b"\x20\0")), (SHADES[0], WHITE)),
    "16-bit grey PNG with alpha": (png(16, 4, b"\x80\0\xff\xff", b"\x20\0\0\0"), (SHADES[0], WHITE)),
    "16-bit RGB PNG": (png(16, 2, b"\x80\0\x20\0\x40\0", b"\x01\xff\0\xff\0\0"), ((128, 32, 64), (1, 0, 0))),
    "16-bit grey TIFF": (saved(sixteen("<", 0x8000, 0x2000), "TIFF"), SHADES),
    "16-bit grey TIFF, big end first": (saved(sixteen(">", 0x8000, 0x2000), "TIFF"), SHADES),
    "16-bit PGM": (b"P5 40 32 65535\n" + (b"\x80\0" * 20 + b"\x20\0" * 20) * 32, SHADES),
    "12-bit PGM": (b"P5 40 32 4095\n" + (b"\x08\0" * 20 + b"\x02\0" * 20) * 32, SHADES),
    "32-bit TIFF of 8 bits": (numbers("I", 128, 32), SHADES),
    "32-bit TIFF of 16 bits": (numbers("I", 0x8000, 0x2000), SHADES),
    "32-bit TIFF of 31 bits": (numbers("I", 0x40000000, 0x20000000), ((64,) * 3, (32,) * 3)),
    "32-bit TIFF below 0": (numbers("I", -5, 32), ((0,) * 3, (32,) * 3)),
    "float TIFF up to 1": (numbers("F", 128 / 255, 32 / 255), SHADES),
    "float TIFF up to 255": (numbers("F", 127.9, 32.2), SHADES),
    "float TIFF that is no number": (numbers("F", 128.0, float("nan")), ((128,) * 3, (0,) * 3)),
    "RGB PNG": (saved(halves("RGB", (1, 2, 3), (4, 5, 6)), "PNG"), ((1, 2, 3), (4, 5, 6))),
    "RGBA PNG": (saved(halves("RGBA", (0, 0, 0, 255), (0, 0, 0, 0)), "PNG"), ((0, 0, 0), WHITE)),
    "RGBA PNG, half transparent": (saved(halves("RGBA", (10, 200, 30, 255), (10, 200, 30, 51)), "PNG"),
                                   ((10, 200, 30), (206, 244, 210))),
    "LA PNG": (saved(halves("LA", (77, 255), (77, 0)), "PNG"), ((77,) * 3, WHITE)),
    "RGB PNG, one colour transparent": (saved(halves("RGB", (1, 2, 3), (4, 5, 6)), "PNG", transparency=(4, 5, 6)),
                                        ((1, 2, 3), WHITE)),
    "grey PNG, one grey transparent": (saved(halves("L", 0, 9), "PNG", transparency=0), (WHITE, (9,) * 3)),
    "1-bit PNG, black transparent": (png(1, 0, b"\0", b"\xff", chunk(b"tRNS", b"\0\0"), (16, 2)), (WHITE, WHITE)),
    "palette PNG": (palette(), ((10, 20, 30), (40, 50, 60))),
    "palette PNG, one colour transparent": (palette(transparency=2), ((10, 20, 30), WHITE)),
    "palette PNG, a colour half transparent": (palette(transparency=b"\xff\xff\x33"), ((10, 20, 30), (212, 214, 216))),
    "1-bit PNG": (saved(halves("1", 255, 0), "PNG"), (WHITE, (0,) * 3)),
    "CMYK TIFF": (saved(halves("CMYK", (0, 255, 255, 0), (200, 100, 50, 0)), "TIFF"), ((255, 0, 0), (55, 155, 205))),
    "LAB TIFF": (saved(halves("LAB", (128, 128, 128), (255, 128, 128)), "TIFF"), ((119, 119, 119), (254, 255, 254))),
    "moving GIF": (saved(Image.new("RGB", SIZE, (255, 0, 0)), "GIF", **FRAMES), ((255, 0, 0),) * 2),
    "moving WEBP": (saved(Image.new("RGB", SIZE, (255, 0, 0)), "WEBP", lossless=True, **FRAMES), ((255, 0, 0),) * 2),
    "transparent GIF": (palette("GIF", transparency=2), ((10, 20, 30), WHITE)),
    "JPEG 2000": (saved(halves("RGB", (1, 2, 3), (1, 2, 3)), "JPEG2000"), ((1, 2, 3),) * 2),
    "BMP": (saved(halves("RGB", (1, 2, 3), (4, 5, 6)), "BMP"), ((1, 2, 3), (4, 5, 6)))}


def ends(image):
    return image.getpixel((0, 1)), image.getpixel((image.width - 1, 1))


@pytest.fixture
def task_of(tmp_path):
    """A task with the picture whose bytes are given, read from a file of tasks."""
    def make(data, name="picture"):
        (tmp_path / name).write_bytes(data)
        row = {"id": 1, "family": "coding", "question": "q", "answers": ["x"], "image_path": name}
        (tmp_path / "tasks.json").write_text(json.dumps([row]))
        return load_tasks(tmp_path / "tasks.json")[0]
    return make


@pytest.mark.parametrize("name", FILES)
def test_a_picture_of_any_mode_has_one_value_everywhere(policy, tool, task_of, name):
    data, shown = FILES[name]
    task = task_of(data)
    picture, encoded = _load_image(policy, task["image"])
    assert (picture.mode, ends(picture)) == ("RGB", shown)
    assert encoded.pixels.equal(encode_image(policy, Image.open(io.BytesIO(data))).pixels)
    assert ends(tool.run("result = image", Image.open(io.BytesIO(data))).image) == shown  # the input of code, …
    assert ends(tool.run(f"open({OUTPUT!r}, 'wb').write({data!r})", picture).image) == shown  # … and its output
    sent = chat_messages(Rollout(task, [], [], [], pictures=[picture], opening="q"))[0]["content"][0]["image_url"]["url"]
    assert ends(Image.open(io.BytesIO(b64decode(sent.partition(",")[2])))) == shown
    _embed(images := {}, Path(task["image"]))
    (uri, *size), = images
    page = Image.open(io.BytesIO(b64decode(uri.partition(",")[2]))).convert("RGB")
    assert tuple(size) == picture.size and all(
        abs(a - b) <= 8 for got, want in zip(ends(page), shown) for a, b in zip(got, want))  # the page may be a JPEG


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read(task_of):
    picture = open_picture(task_of(saved(Image.new("RGB", SIZE, (255, 0, 0)), "AVIF"))["image"])
    assert all(abs(a - b) <= 2 for a, b in zip(picture.getpixel((0, 0)), (255, 0, 0)))


@pytest.mark.parametrize("mode, left, right, shown", [
    ("La", (77, 255), (0, 0), (77,) * 3), ("RGBa", (7, 8, 9, 255), (0, 0, 0, 0), (7, 8, 9)),
    ("PA", (1, 255), (2, 0), (10, 20, 30)), ("I;16L", 0x8000, 0xffff, (128,) * 3), ("I;16N", 0x8000, 0xffff, (128,) * 3)])
def test_modes_that_no_file_has(mode, left, right, shown):
    picture = halves(mode, left, right) if mode[0] != "I" else Image.new(mode, SIZE, left)
    if mode == "PA":
        picture.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
    assert ends(to_rgb(picture)) == (shown, WHITE if mode[0] != "I" else shown)


def test_a_plain_picture_is_not_copied():
    picture = Image.new("RGB", SIZE)
    assert to_rgb(picture) is picture


# ---- EXIF
def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright_once(task_of, kind, orientation):
    made = Image.new("RGB", (48, 32), "black")
    made.paste("white", (0, 0, 16, 16))  # a white corner, then any turn can be told from the others
    made.paste((128, 128, 128), (32, 0, 48, 16))
    data = saved(made, kind, exif=exif(orientation))
    places = {1: (4, 4), 2: (44, 4), 3: (44, 28), 4: (4, 28), 5: (4, 4), 6: (28, 4), 7: (28, 44), 8: (4, 44)}
    picture = open_picture(task_of(data)["image"])
    assert picture.size == ((48, 32) if orientation < 5 else (32, 48))
    assert min(picture.getpixel(places[orientation])) > 200
    assert picture.tobytes() == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).tobytes()
    assert to_rgb(picture).tobytes() == to_rgb(to_rgb(Image.open(io.BytesIO(data)))).tobytes() == picture.tobytes()


BLOCK = exif(6).tobytes()
NONSENSE = {"words": b"Exif\0\0nonsense", "no header": b"nonsense", "empty": b"Exif\0\0", "cut in the header": BLOCK[:9],
            "cut in an entry": BLOCK[:20], "no such place": b"Exif\0\0II*\0\xff\xff\xff\xff",
            "orientation that is a text": BLOCK.replace(b"\x01\x12\0\x03", b"\x01\x12\0\x02")}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("block", NONSENSE)
def test_nonsense_in_the_exif_block_is_ignored(policy, tool, task_of, kind, block):
    data = saved(Image.new("RGB", (60, 80), "red"), kind, exif=NONSENSE[block])
    picture, _ = _load_image(policy, task_of(data)["image"])
    assert picture.size == (60, 80) and picture.getpixel((9, 9))[0] > 250
    assert tool.run(f"open({OUTPUT!r}, 'wb').write({data!r})", picture).image.size == (60, 80)
    assert _embed({}, Path(task_of(data)["image"])) == 0


def test_random_exif_blocks_never_cost_the_picture(tmp_path):
    rng, turned = random.Random(0), 0
    block = exif(6)
    block[0x010f], block[0x011a] = "maker", 72.0
    good = block.tobytes()
    for _ in range(400):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            bad[rng.randrange(6, len(bad))] = rng.randrange(256)
        (tmp_path / "a.png").write_bytes(saved(Image.new("RGB", (6, 8)), "PNG", exif=bytes(bad[:rng.randrange(8, 300)])))
        turned += open_picture(tmp_path / "a.png").size == (8, 6)
    assert 50 < turned < 350  # some blocks still have their orientation


def test_an_orientation_counts_though_the_rest_cannot_be_written(tmp_path):
    """exif_transpose of Pillow writes the block anew: a text in place of a number fails there."""
    block = exif(6)
    block[0x011a] = 72.0
    entry = block.tobytes().replace(b"\x01\x1a\0\x05\0\0\0\x01", b"\x01\x1a\0\x02\0\0\0\x08")
    data = saved(Image.new("RGB", (60, 80)), "PNG", exif=entry)
    (tmp_path / "a.png").write_bytes(data)
    assert open_picture(tmp_path / "a.png").size == (80, 60)


# ---- sizes
@pytest.mark.thorough
def test_a_large_photo_is_bounded_once_and_can_be_repaired_in_its_size(policy, tool, task_of):
    picture, _ = _load_image(policy, task_of(saved(Image.new("1", (5000, 4000)), "PNG"))["image"])
    assert picture.size == (4579, 3663) and 4579 * 3663 <= MAX_PICTURE  # 4096 * sqrt(5 / 4), 4096 * sqrt(4 / 5)
    same = tool.run(f"image.save({OUTPUT!r}, 'BMP')", picture)
    assert (same.text, same.image.size) == ("", picture.size)
    turned = tool.run(f"image.rotate(90, expand=True).save({OUTPUT!r}, 'BMP')", picture)
    assert (turned.text, turned.image.size) == ("", (3663, 4579))


def test_a_picture_at_the_bound_stays_as_it_is(task_of):
    assert open_picture(task_of(saved(Image.new("1", (4096, 4096)), "PNG"))["image"]).size == (4096, 4096)


@pytest.mark.parametrize("size", [(2, 455), (600, 2), (9000, 40), (1, 300), (201, 1), (60_000, 290)])
def test_a_strip_that_no_model_reads_is_refused_at_loading(task_of, size):
    with pytest.raises(ValueError, match=r"tasks\.json, row 1: image .*picture has .*x.* pixels: .*200 times.*crop or pad it"):
        task_of(saved(Image.new("L", size), "PNG"))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (100, 3), (2, 400), (5600, 28)])
def test_what_is_accepted_can_be_encoded(policy, task_of, size):
    picture, encoded = _load_image(policy, task_of(saved(Image.new("L", size), "PNG"))["image"])
    assert picture.size == size and encoded.pixels.isfinite().all()


@pytest.mark.parametrize("size, made, error", [((20, 12), "image", None), ((20, 12), "image.rotate(90, expand=True)", None),
                                               ((20, 12), "image.resize((11, 20))", "bad_image"), ((1, 1), "image", None),
                                               ((20, 12), "image.resize((2401, 12))", "bad_image"),
                                               ((300, 200), "image.crop((0, 0, 27, 99))", "bad_image")])
def test_code_may_make_a_picture_as_small_as_its_input(tool, size, made, error):
    assert tool.run(f"result = {made}", Image.new("RGB", size)).error == error


@pytest.mark.parametrize("data, reason", [
    (png(8, 2, b"", b"", size=(20_000, 10_000)), "200000000 pixels.* exceeds limit"),
    (b"GIF89a" + struct.pack("<HHBBB", 0, 0, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 0, 0, 0) + b"\x02\0;", ""),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", "cannot identify"),  # or Ghostscript would be started
    (saved(Image.effect_noise((99, 99), 60), "PNG")[:-2000], "truncated"), (b"", "cannot identify")],
    ids=["too large", "no pixels", "EPS", "cut", "empty"])
def test_a_file_that_cannot_be_read_is_refused_at_loading(task_of, data, reason):
    with pytest.raises(ValueError, match=rf"tasks\.json, row 1: image .*picture cannot be read \(.*{reason}.*; replace it or"):
        task_of(data)
