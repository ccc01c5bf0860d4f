"""The server of a report: what it answers, to whom, and when it builds again."""

import http.client
import json
import re
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from llada_megatron.cli import main
from llada_megatron.config.errors import BadInput
from llada_megatron.observe import server
from llada_megatron.observe.parts import Heading
from llada_megatron.observe.report import Report
from llada_megatron.observe.server import LiveReport, Server
from llada_megatron.record.run_dir import RunDir
from tests.observe.evaluations import results, write
from tests.observe.runs import make_run


class Builds:
    """A quick report that counts how often it was made."""

    def __init__(self, going=True):
        self.count, self.going, self.fault = 0, going, None

    def __call__(self, run_dir: Path) -> Report:
        self.count += 1
        if self.fault is not None:
            raise self.fault
        folder = RunDir(run_dir).report
        folder.mkdir(exist_ok=True)
        (folder / "loss.png").write_bytes(b"picture")
        return Report(folder, [Heading(f"build {self.count}", 1)], {"progress": {"going": self.going}})


@contextmanager
def serving(run_dir, builds):
    with Server(LiveReport(run_dir, builds, rest=0.0), port=0) as started:
        thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield started
        finally:
            started.shutdown()
            thread.join()


@pytest.fixture
def builds():
    return Builds()


@pytest.fixture
def running(tmp_path, builds):
    (tmp_path / "secret.png").write_bytes(b"not for browsers")
    with serving(tmp_path, builds) as started:
        yield started


def ask(started, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", started.server_port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read(), answer.headers


def state(started):
    return json.loads(ask(started, "/state.json")[1])


def test_it_listens_on_this_machine_alone(running):
    assert running.server_address[0] == "127.0.0.1" and running.url.startswith("http://127.0.0.1:")


def test_it_answers_for_the_page_its_pictures_and_its_state(running):
    page, picture = ask(running, "/"), ask(running, "/loss.png?1a2b")
    assert page[0] == 200 and b"build 1" in page[1] and page[2]["Content-Type"].startswith("text/html")
    assert picture[:2] == (200, b"picture") and picture[2]["Content-Type"] == "image/png"
    assert ask(running, "/index.html")[1] == page[1]
    assert state(running) == {"version": "1", "going": True, "problem": ""}
    assert ask(running, "/", "HEAD")[:2] == (200, b"")
    for _, _, headers in (page, picture):
        assert (
            headers["Cache-Control"] == "no-store" and "frame-ancestors" in headers["Content-Security-Policy"]
        )


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.png",
        "/%2e%2e/secret.png",
        "//secret.png",
        "/./loss.png",
        "/report.json",
        "/config.yaml",
        "/x",
    ],
)
def test_nothing_but_the_report_can_be_asked_for(running, path):
    assert ask(running, path)[0] == 404


def test_a_link_out_of_the_folder_is_not_followed(running, tmp_path):
    (tmp_path / "report" / "link.png").symlink_to(tmp_path / "secret.png")
    assert ask(running, "/link.png")[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"])
def test_it_can_only_be_read(running, builds, method):
    assert ask(running, "/", method)[0] == 501 and builds.count == 1


def test_a_page_of_somebody_else_that_had_its_name_lead_here_is_refused(running):
    port = running.server_port
    assert ask(running, "/", Host=f"evil.example:{port}")[0] == 421
    assert ask(running, "/state.json", Host="")[0] == 421
    for ours in (f"localhost:{port}", "127.0.0.1", "localhost:9000"):  # the last: the end of a tunnel
        assert ask(running, "/", Host=ours)[0] == 200


def test_it_builds_again_when_the_run_has_written_something_and_not_before(running, builds, tmp_path):
    assert [state(running)["version"] for _ in range(3)] == ["1"] * 3
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert state(running)["version"] == "2" and b"build 2" in ask(running, "/")[1]
    (tmp_path / "evaluations.jsonl").write_text("{}\n")
    assert [state(running)["version"] for _ in range(3)] == ["3"] * 3 and builds.count == 3
    write(RunDir(tmp_path).scores, results("runs/a", "threshold", "0.9", accuracy=0.8, speed=2.0))
    assert state(running)["version"] == "4"


def test_it_rests_after_it_has_built(tmp_path, builds):
    report = LiveReport(tmp_path, builds, rest=1e12)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert json.loads(report.file("state.json")[1])["version"] == "1" and builds.count == 1


@pytest.mark.parametrize(("going", "built"), [(True, 2), (False, 1)])
def test_a_run_that_goes_on_in_silence_is_looked_at_again(tmp_path, monkeypatch, going, built):
    monkeypatch.setattr(server, "STALE_SEC", 0.0)
    report = LiveReport(tmp_path, builds := Builds(going), rest=0.0)
    report.file("state.json")
    assert builds.count == built


def test_a_run_that_cannot_be_read_for_a_moment_keeps_its_page_and_says_why(running, builds, tmp_path):
    builds.fault = BadInput("line 3 is not JSON")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert state(running) == {"version": "1", "going": True, "problem": "line 3 is not JSON"}
    assert b"build 1" in ask(running, "/")[1]
    builds.fault = None
    assert state(running) == {"version": "2", "going": True, "problem": ""}


def test_a_page_of_a_finished_run_asks_no_more(tmp_path):
    with serving(tmp_path, Builds(going=False)) as started:
        assert state(started)["going"] is False


def test_a_port_that_is_taken_is_refused_in_one_sentence(running, tmp_path):
    with pytest.raises(BadInput, match=rf"port {running.server_port} cannot be had .*--port"):
        Server(running.report, running.server_port)
    with pytest.raises(BadInput, match=r"port 70000 cannot be had .*--port"):
        Server(running.report, 70_000)


def test_the_command_serves_the_page_until_ctrl_c(tmp_path, capsys, monkeypatch):
    def interrupted(started):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    run_dir = make_run(tmp_path / "run", stop_after=3, evaluated=False)
    assert main(["report", str(run_dir), "--serve", "--port", "0"]) == 130
    assert re.search(r"http://127\.0\.0\.1:\d+/ shows .*run; Ctrl-C", capsys.readouterr().out)


def test_the_command_refuses_what_it_cannot_serve(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--serve"]) == 2
    assert main(["report", str(tmp_path), "--port", "8000"]) == 2
    assert main(["report", str(tmp_path), "--serve", "--json", "figures.json"]) == 2
    assert main(["report", "--compare", str(tmp_path), "--serve"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and all(line.startswith("llada report: error: ") for line in said)
