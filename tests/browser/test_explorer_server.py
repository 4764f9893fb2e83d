"""The explorer as a server: hostile files and requests, several people, what is left behind. No browser is needed."""

import gc
import json
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from gift.cli import main
from gift.data.pictures import picture_files, read_pictures
from gift.explain.exploring import open_explorer
from gift.explain.viewer import Viewer
from gift.serving import MAX_FILE_BYTES, PASSWORD, check_address, serving
from tests.browser.gradio_session import Refused, Session

FORMATS = {"PNG": "png", "JPEG": "jpg", "GIF": "gif", "BMP": "bmp", "WEBP": "webp", "TIFF": "tif", "PPM": "ppm"}

REASONS = ("cannot be decoded", "too large", "too long", "animated", "more than 8 bits")


def damaged_files(folder, count, seed=0):
    """Write files of all kinds: random bytes, and pictures that were cut, changed, extended or renamed."""
    rng = random.Random(seed)
    folder.mkdir()
    kinds = list(FORMATS.items())
    for number in range(count):
        form, suffix = kinds[number % len(kinds)]
        path = folder / f"{number:04}.{suffix if number % 5 else rng.choice(['png', 'svg', 'jpg', 'heic'])}"
        noise = np.frombuffer(rng.randbytes(24 * 24 * 3), np.uint8).reshape(24, 24, 3)
        Image.fromarray(noise).save(path, form)
        content = bytearray(path.read_bytes())
        damage = number % 4
        if damage == 0:
            content = bytearray(rng.randbytes(rng.randrange(2000)))
        elif damage == 1:
            content = content[: rng.randrange(len(content))]
        elif damage == 2:
            for _ in range(rng.randrange(1, 40)):
                content[rng.randrange(len(content))] = rng.randrange(256)
        else:
            at = rng.randrange(len(content))
            content[at:at] = rng.randbytes(rng.randrange(1, 200))
        path.write_bytes(content)
    return sorted(folder.iterdir())


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def memory_mb(process):
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of another process is read from /proc")
def test_of_many_damaged_files_each_gets_an_error_or_an_answer(own_run, striped, tmp_path, repetitions):
    """By a process of its own, whose memory is watched."""
    count = repetitions(300, 1000)
    files, good = damaged_files(tmp_path / "damaged", count), striped / "test" / "down" / "0.png"
    words = ["--adapter", str(own_run), "--images", str(striped / "test"), "--port", "7913"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "gift", "explore", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        said = process.stdout.readline()
        assert "http://127.0.0.1:7913" in said
        session = Session("http://127.0.0.1:7913")
        expected, refusals, answered, after = session.open(good), {}, 0, []
        for number, path in enumerate(files):
            try:
                name, shares = session.open(path)
            except Refused as refusal:
                refusals[path.name] = str(refusal)
            else:
                assert name == path.name
                assert abs(sum(shares.values()) - 1) < 1e-4
                answered += 1
            if number % (count // 10) == count // 10 - 1:
                after.append(memory_mb(process.pid))
        assert len(refusals) + answered == count
        assert len(refusals) > count / 2
        assert answered > count / 20
        assert all(name in said and any(word in said for word in REASONS) for name, said in refusals.items())
        assert session.open(good) == expected
        assert process.poll() is None
        assert after[-1] < after[1] + 40, after  # megabytes
        uploaded = {path.name for path in files}
        kept = {path.parent.name for path in tmp_path.rglob("*") if path.name in uploaded}
        assert kept == {"damaged"}  # uploads are deleted
    finally:
        process.terminate()
        process.communicate(timeout=30)
        assert not list(tmp_path.glob("gift-explorer-*"))


@pytest.mark.slow
def test_explain_answers_for_many_damaged_files(trained, striped, tmp_path, capsys, repetitions):
    count = repetitions(300, 1000)
    files = damaged_files(tmp_path / "damaged", count)
    viewer = Viewer.load(trained[0])
    pictures, problems = read_pictures(picture_files(files), viewer.geometry)
    assert len(pictures) + len(problems) == count
    assert all(name in problem for name, problem in problems.items())
    seen = viewer.see(pictures)
    assert np.isfinite(seen.maps.maps).all()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del pictures, seen
    gc.collect()
    words = ["explain", "--adapter", str(trained[0]), "--out", str(tmp_path / "out"), "--count", "1000", "--images"]
    main([*words, *map(str, files[:200]), str(striped / "test" / "down" / "0.png")])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 300_000  # kilobytes
    record = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert len(record["pictures"]) + len(record["problems"]) == 201
    assert f"Not read: {len(record['problems'])}" in capsys.readouterr().out


def test_four_people_at_once_get_right_and_unmixed_answers(own_run, trained, striped):
    paths = [path for kind in ("across", "down", "plain") for path in sorted((striped / "test" / kind).iterdir())][:24]
    explorer = open_explorer(own_run, [striped / "test"])
    viewer, expected = Viewer.load(trained[0]), {}
    for path in paths:
        (picture,), _ = read_pictures(picture_files([path]), viewer.geometry)
        expected[path] = dict(viewer.see([picture]).predictions(0))
    wrong, done = [], []

    def person(url, number):
        session = Session(url)
        for path in paths[number::4] * 2:
            name, shares = session.open(path)
            if name != path.name or any(abs(shares[each] - share) > 1e-5 for each, share in expected[path].items()):
                wrong.append((number, path, name, shares))
            done.append(path)

    with serving(explorer) as (url, _):
        threads = [threading.Thread(target=person, args=(url, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    assert wrong == []
    assert len(done) == 48


def test_a_password_is_asked_for_every_request(own_run, striped, monkeypatch):
    monkeypatch.setenv(PASSWORD, "correct horse")
    with serving(open_explorer(own_run, []), user="ada") as (url, _):
        stranger = httpx.Client(base_url=url, trust_env=False)
        for path in (
            "config",
            "gradio_api/info",
            "gradio_api/queue/data?session_hash=x",
            "gradio_api/file=/etc/hostname",
        ):
            assert stranger.get(f"/{path}").status_code == 401, path
        assert stranger.post("/gradio_api/upload", files={"files": b"x"}).status_code == 401
        join = {"data": [], "fn_index": 0, "session_hash": "x"}
        assert stranger.post("/gradio_api/queue/join", json=join).status_code == 401
        for login in (("ada", "wrong"), ("ada", ""), ("", ""), ("bob", "correct horse")):
            with pytest.raises(httpx.HTTPStatusError, match=r"4\d\d"):
                Session(url, login)
        picture = striped / "test" / "down" / "0.png"
        assert Session(url, ("ada", "correct horse")).open(picture)[0] == "0.png"


def test_a_picture_is_put_away_half_an_hour_after_its_last_use_and_that_is_said(own_run, striped):
    with serving(open_explorer(own_run, [striped / "test"])) as (url, page):
        session = Session(url)
        session.open(striped / "test" / "down" / "0.png")
        state, functions = page.app.state_holder[session.hash], session.config["dependencies"]
        values = {each["id"]: each["props"].get("value") for each in session.config["components"]}
        opened = functions[session.function("upload", "upload")]["outputs"][0]
        using = {tuple(each["outputs"]): each for each in functions if opened in each["inputs"]}

        def wait(seconds):
            for key, (time_to_live, since) in state._state_ttl.items():
                state._state_ttl[key] = time_to_live, since - timedelta(seconds=seconds)
            page.app.state_holder.delete_all_expired_state()

        def use(function):
            session.call(function["id"], [values[each] for each in function["inputs"]])

        for function in using.values():
            wait(1000)
            use(function)
        assert len(using) == 3  # clusters, label map, combination
        wait(1000)
        assert state[opened] is not None
        wait(1000)
        assert state[opened] is None
        with pytest.raises(Refused, match="put away after half an hour without use: open it again"):
            use(functions[session.function("layer", "change")])


@pytest.mark.parametrize("given", ["", None])
def test_others_are_let_in_only_with_a_password(own_run, monkeypatch, given):
    explorer = open_explorer(own_run, [])
    with (
        pytest.raises(ValueError, match=r"0\.0\.0\.0 can be reached by others: give a user"),
        serving(explorer, "0.0.0.0"),
    ):
        pass
    monkeypatch.delenv(PASSWORD, raising=False)
    monkeypatch.setattr("getpass.getpass", lambda prompt: "")
    with pytest.raises(ValueError, match="password of ada must not be empty"), serving(explorer, "0.0.0.0", user="ada"):
        pass


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no address ::1")
def test_it_can_be_reached_by_version_6_of_the_protocol(own_run, striped):
    with serving(open_explorer(own_run, []), "::1") as (url, _):
        assert url.startswith("http://[::1]:")
        assert Session(url).open(striped / "test" / "down" / "0.png")[0] == "0.png"


def test_no_other_file_can_be_read_and_no_address_is_fetched(own_run, striped, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (32, 32)).save(secret)
    with serving(open_explorer(own_run, [striped / "test"])) as (url, _):
        session = Session(url)
        session.open(striped / "test" / "down" / "0.png")
        adapter = own_run / "adapter" / "adapter_model.safetensors"
        for path in (secret, adapter, "/etc/passwd", f"/proc/self/cwd/{secret}", f"..{secret}", f"/tmp/../{secret}"):
            assert session.get(f"/file={path}").status_code in (403, 404), path
        kind = {"meta": {"_type": "gradio.FileData"}}
        opening = session.function("upload", "upload")
        for file in ({"path": str(secret)}, {"path": "/etc/passwd", "url": url}, {"path": f"{url}config"}):
            with pytest.raises(Refused):
                session.call(opening, [file | kind])
        with pytest.raises(Refused, match="Addresses are not fetched"):
            session.call(opening, [{"path": "http://192.0.2.1/picture.png"} | kind])
        scan, look = session.function("scan", "click"), ["viridis", 0.9, 0]
        with pytest.raises(Refused):
            session.call(scan, [str(tmp_path), "L0/C0", 4, *look])
        for wrong in (["L9/C0", 4], ["../../etc/passwd", 4], ["L0/C0", 1e9], ["L0/C0", -1], [{"a": 1}, 4], [None, 4]):
            with pytest.raises(Refused):
                session.call(scan, [str(striped / "test"), *wrong, *look])
        with pytest.raises(Refused):
            session.call(scan, [str(striped / "test"), "L0/C0", 4, "viridis", 7, 0])
        assert session.call(scan, [str(striped / "test"), "L0/C0", 4, *look])


def test_files_that_are_too_large_are_refused(own_run, tmp_path):
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1_000_000)
    with serving(open_explorer(own_run, [])) as (url, _), pytest.raises(Refused, match="413"):
        Session(url).open(tmp_path / "large.png")


def test_nothing_is_left_behind_and_the_port_is_free_again(own_run, striped):
    with serving(open_explorer(own_run, [striped / "test"])) as (url, _):
        Session(url).open(striped / "test" / "down" / "0.png")
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert [path for path in folder.rglob("*") if path.is_file()]
    assert not folder.exists()
    for _ in range(50):
        try:
            httpx.get(url, timeout=1)
        except httpx.ConnectError:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("it still answers")


@pytest.mark.parametrize("port", [0, -1, 99_999])
def test_a_port_that_cannot_be_is_refused(port):
    with pytest.raises(ValueError, match=f"port must lie between 1 and 65535, got {port}"):
        check_address("127.0.0.1", port, None)


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match="2"):
            main(["explore", "--adapter", str(tmp_path / "missing"), "--port", str(port)])
    assert f"Port {port} of 127.0.0.1 cannot be listened on" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"192\.0\.2\.1 cannot be listened on"):
        check_address("192.0.2.1", None, "ada")


def test_the_command_says_what_is_wrong_before_it_serves(tmp_path, own_run, capsys):
    for words, said in (
        (["--adapter", str(tmp_path / "missing")], "holds no adapter"),
        (["--adapter", str(own_run), "--images", str(tmp_path / "missing")], "neither an image nor a folder"),
        (["--adapter", str(own_run), "--host", "0.0.0.0"], "can be reached by others"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["explore", *words])
        assert said in capsys.readouterr().err
