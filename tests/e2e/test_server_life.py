"""A server's life around the streams: bad input, too few slots, clients that leave, stopping, and no process left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from elastic_ep.testing.server import ServerProcess, rank_processes

NO_GPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def elastic_ep(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "elastic_ep.cli.main", *arguments], capture_output=True, text=True, timeout=60)


def post(url: str, body: dict, timeout_s: float = 30.0) -> dict:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return json.load(answer)


def wait_gone(pids: list[int], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while rank_processes(pids):
        assert time.monotonic() < deadline, f"still running: {rank_processes(pids)}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def broken(checkpoint, tmp_path_factory):
    """name -> a checkpoint that cannot be served."""
    root = tmp_path_factory.mktemp("broken")
    good = checkpoint("qwen3_moe")
    folders = {name: root / name for name in ("truncated", "unsupported", "no_config", "mis_shaped")}
    for folder in folders.values():
        folder.mkdir()
        for file in good.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    weights = folders["truncated"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    config = json.loads((good / "config.json").read_text())
    (folders["unsupported"] / "config.json").write_text(json.dumps(config | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folders["no_config"] / "config.json").unlink()
    (folders["mis_shaped"] / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 48}))
    return folders


@pytest.mark.parametrize("name", ["truncated", "unsupported", "no_config", "mis_shaped"])
def test_a_bad_checkpoint_is_one_line(broken, name):
    result = elastic_ep("serve", str(broken[name]), "--port", "0")
    assert result.returncode == 2
    assert result.stderr.startswith("elastic-ep serve: error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere"], ["/nowhere"]),
        (["--ep-size", "0"], ["--ep-size is 0", "at least 1"]),
        (["--ep-size", "9"], ["--ep-size is 9", "8 experts"]),
        (["--num-redundant-experts", "-1"], ["--num-redundant-experts is -1"]),
        (["--num-redundant-experts", "99"], ["--num-redundant-experts is 99"]),
        (["--port", "70000"], ["--port is 70000"]),
        (["--max-model-len", "4096"], ["--max-model-len is 4096", "512"]),
        (["--fault", "x"], ["--fault 'x'"]),
        (["--fault", "0:nowhere:kill"], ["nowhere", "step_begin"]),
        (["--fault", "0:step_begin:explode"], ["explode", "kill"]),
        (["--step-timeout", "0"], ["--step-timeout is 0"]),
        (["--kv-tokens", "0"], ["--kv-tokens is 0"]),
        (["--dispatch", "cuda"], ["--dispatch cuda", "--device cuda"]),
        pytest.param(["--device", "cuda"], ["sees no GPU", "--device cpu"], marks=NO_GPU_ONLY),
    ],
)
def test_a_bad_argument_names_value_and_cure(checkpoint, arguments, words):
    folder = [] if arguments[0].startswith("/") else [str(checkpoint("qwen3_moe"))]
    result = elastic_ep("serve", *folder, *arguments)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


def test_too_few_open_files(checkpoint):
    command = [sys.executable, "-P", "-m", "elastic_ep.cli.main", "serve", str(checkpoint("qwen3_moe")), "--ep-size", "4"]
    limited = ["sh", "-c", 'ulimit -n 24 && exec "$@"', "sh", *command]
    result = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr == (
        "elastic-ep serve: error: the system lets this process open 24 files; a server with --ep-size 4 takes up to 56, "
        "and one for each client: raise the limit (ulimit -Hn, LimitNOFILE in a systemd unit)\n"
    )


def test_a_taken_port(checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = elastic_ep("serve", str(checkpoint("qwen3_moe")), "--port", str(port))
    assert result.returncode == 2
    assert f"127.0.0.1:{port}" in result.stderr
    assert "another --port" in result.stderr


def test_http_refusals_and_facts(checkpoint):
    with ServerProcess(checkpoint("qwen3_moe"), "--served-model-name", "tiny", "--ep-size", "2") as server:
        pids = [server.rank_pid(rank) for rank in range(2)]

        def status_of(body: dict | bytes) -> tuple[int, str]:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            request = urllib.request.Request(f"{server.url}/v1/completions", data, {"Content-Type": "application/json"})
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request, timeout=10)
            with caught.value as error:
                return error.code, json.load(error)["error"]["message"]

        assert status_of(b"{")[0] == 400
        assert status_of({"model": "other", "prompt": [1]})[0] == 404
        code, message = status_of({"model": "tiny", "prompt": [1] * 600})
        assert code == 400
        assert "600" in message
        assert "512" in message
        assert status_of({"model": "tiny", "prompt": [9999]})[0] == 400
        with urllib.request.urlopen(f"{server.url}/health", timeout=10) as answer:
            assert answer.status == 200
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
            assert b"elastic_ep_active_ranks 2.0" in answer.read()
        assert server.stop() == 0
        assert "Traceback" not in server.stderr
    wait_gone(pids, 5.0)


def test_refuse_when_short(checkpoint):
    with ServerProcess(checkpoint("qwen3_moe"), "--ep-size", "2", "--when-short", "refuse", "--restart", "never") as server:
        server.signal_rank(1)
        server.wait_status(lambda status: status["phase"] == "refusing")
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(f"{server.url}/v1/completions", {"model": server.facts["model"], "prompt": [1]})
        with caught.value as error:
            assert error.code == 503
            assert "4 live slots cannot hold 8 experts: 4 missing" in json.load(error)["error"]["message"]
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{server.url}/health", timeout=10)
        caught.value.close()
        assert caught.value.code == 503


def test_the_last_rank_ends_the_server_with_its_reason(checkpoint):
    with ServerProcess(checkpoint("qwen3_moe"), "--restart", "never") as server:
        server.signal_rank(0)
        server.process.wait(10)
        assert server.stop() == 1
        assert "no rank is left alive; the last, rank 0, failed: exited: signal SIGKILL" in server.stderr


def test_all_ranks_die_and_the_server_lives(checkpoint):
    with ServerProcess(checkpoint("qwen3_moe"), "--ep-size", "2") as server:
        body = {"model": server.facts["model"], "prompt": [1, 2], "max_tokens": 300, "temperature": 0, "ignore_eos": True}
        answers = []
        thread = threading.Thread(target=lambda: answers.append(post(f"{server.url}/v1/completions", body | {"return_token_ids": True})))
        thread.start()
        server.wait_status(lambda status: status["tokens_committed"] > 20)
        for pid in [rank["pid"] for rank in server.status()["ranks"]]:
            os.kill(pid, signal.SIGKILL)
        thread.join(30)
        ids = answers[0]["choices"][0]["token_ids"]
        assert ids == post(f"{server.url}/v1/completions", body | {"return_token_ids": True})["choices"][0]["token_ids"]


def test_ranks_end_when_the_controller_is_killed(checkpoint):
    with ServerProcess(checkpoint("qwen3_moe"), "--ep-size", "3") as server:
        pids = [server.rank_pid(rank) for rank in range(3)]
        os.kill(server.process.pid, signal.SIGKILL)
        wait_gone(pids, 5.0)


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def test_a_stopped_launcher_keeps_no_seat_empty(checkpoint):
    with ServerProcess(checkpoint("qwen3_moe"), "--ep-size", "2", "--num-redundant-experts", "8") as server:
        (launcher,) = children(server.process.pid)
        os.kill(launcher, signal.SIGSTOP)
        server.signal_rank(1)
        server.wait_status(lambda s: s["active_ranks"] == [1, 1] and s["ranks"][1]["incarnation"] > 0 and s["phase"] == "serving")
        assert children(server.process.pid) == [launcher]
        server.stop()
    assert f"the launcher, process {launcher}, is stopped by a signal; it is woken" in server.stderr


def test_a_process_that_cannot_be_forked_ends_no_other(checkpoint):
    with ServerProcess(checkpoint("qwen3_moe"), "--ep-size", "3", "--num-redundant-experts", "8") as server:
        (launcher,) = children(server.process.pid)
        before = [server.rank_pid(rank) for rank in range(3)]
        limits = resource.prlimit(launcher, resource.RLIMIT_NOFILE)
        taken = {int(fd) for fd in os.listdir(f"/proc/{launcher}/fd")}
        free = next(fd for fd in range(len(taken) + 1) if fd not in taken)
        resource.prlimit(launcher, resource.RLIMIT_NOFILE, (free, limits[1]))
        os.kill(before[1], 35)  # a signal without a name
        status = server.wait_status(lambda s: "no process can be started" in s["ranks"][1]["failure"])
        resource.prlimit(launcher, resource.RLIMIT_NOFILE, limits)
        assert [status["ranks"][rank]["pid"] for rank in (0, 2)] == [before[0], before[2]]
        status = server.wait_status(lambda s: s["active_ranks"] == [1, 1, 1] and s["phase"] == "serving")
        assert [status["ranks"][rank]["pid"] for rank in (0, 2)] == [before[0], before[2]]
        assert children(server.process.pid) == [launcher]


def test_a_stopped_rank_and_a_stopped_launcher_end_with_the_controller_too(checkpoint):
    with ServerProcess(checkpoint("qwen3_moe"), "--ep-size", "2") as server:
        (launcher,) = children(server.process.pid)
        pids = [launcher, *(server.rank_pid(rank) for rank in range(2))]
        # the controller would kill a rank that stops: it is to see nothing of it
        for pid in (server.process.pid, pids[2], launcher):
            os.kill(pid, signal.SIGSTOP)
        os.kill(server.process.pid, signal.SIGKILL)
        wait_gone(pids, 5.0)


@pytest.fixture
def closed_terminal():
    """What a closed terminal does to processes that are started: to be set as the shell, or nohup, sets it."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda action: signal.signal(signal.SIGHUP, action)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_closed_terminal_ends_the_server_as_sigterm_does(checkpoint, closed_terminal, number):
    closed_terminal(signal.SIG_DFL)
    with ServerProcess(checkpoint("qwen3_moe"), "--ep-size", "2") as server:
        pids = [server.rank_pid(rank) for rank in range(2)]
        server.process.send_signal(number)
        assert server.process.wait(15) == 0
        wait_gone(pids, 5.0)


def test_a_closed_terminal_does_not_end_a_server_that_nohup_has_started(checkpoint, closed_terminal):
    closed_terminal(signal.SIG_IGN)
    with ServerProcess(checkpoint("qwen3_moe"), "--ep-size", "2") as server:
        server.process.send_signal(signal.SIGHUP)
        assert post(f"{server.url}/v1/completions", {"model": server.facts["model"], "prompt": [1], "max_tokens": 5})["choices"]
        assert server.process.poll() is None


def test_a_file_in_the_working_folder_is_not_imported(checkpoint, tmp_path, monkeypatch):
    for name in ("tokenizers.py", "torch.py", "http.py"):
        (tmp_path / name).write_text("raise SystemExit('from the working folder')")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    with ServerProcess(checkpoint("qwen3_moe").absolute(), "--ep-size", "2") as server:
        assert server.stop() == 0
    assert "working folder" not in server.stderr


NO_MORE_THREADS = """
import os, threading
start = threading.Thread.start
def start_or_not(thread):
    if os.path.exists({flag!r}):
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = start_or_not
"""


def test_a_rank_dies_while_the_system_gives_no_more_threads(checkpoint, tmp_path, monkeypatch):
    flag = tmp_path / "no more threads"
    (tmp_path / "sitecustomize.py").write_text(NO_MORE_THREADS.format(flag=str(flag)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]))
    with ServerProcess(checkpoint("qwen3_moe"), "--ep-size", "2", "--num-redundant-experts", "8") as server:
        body = {"model": server.facts["model"], "prompt": [1, 2], "max_tokens": 300, "temperature": 0, "ignore_eos": True}
        answers = []
        thread = threading.Thread(target=lambda: answers.append(post(f"{server.url}/v1/completions", body | {"return_token_ids": True})))
        thread.start()
        server.wait_status(lambda status: status["tokens_committed"] > 20)
        flag.touch()
        server.signal_rank(0)
        thread.join(30)
        flag.unlink()
        server.wait_status(lambda status: status["active_ranks"] == [1, 1] and status["phase"] == "serving")
        ids = answers[0]["choices"][0]["token_ids"]
        assert ids == post(f"{server.url}/v1/completions", body | {"return_token_ids": True})["choices"][0]["token_ids"]
        assert server.stop() == 0


def test_a_seat_is_filled_again_though_the_folder_of_sockets_was_removed(checkpoint, monkeypatch):
    with tempfile.TemporaryDirectory(prefix="eep") as place:
        monkeypatch.setenv("TMPDIR", place)
        _remove_the_folder_of_sockets(checkpoint, Path(place))


def _remove_the_folder_of_sockets(checkpoint, tmp_path):
    with ServerProcess(checkpoint("qwen3_moe"), "--ep-size", "3", "--num-redundant-experts", "8") as server:
        body = {"model": server.facts["model"], "prompt": [1, 2], "max_tokens": 20, "temperature": 0, "return_token_ids": True}
        before = post(f"{server.url}/v1/completions", body)["choices"][0]["token_ids"]
        (folder,) = tmp_path.glob("elastic-ep-*")
        shutil.rmtree(folder)
        for rank, incarnations in ((2, [0, 0, 1]), (0, [1, 0, 1])):
            server.signal_rank(rank)
            status = server.wait_status(
                lambda s, r=rank: s["active_ranks"] == [1, 1, 1] and s["ranks"][r]["incarnation"] > 0 and s["phase"] == "serving"
            )
            assert [r["incarnation"] for r in status["ranks"]] == incarnations, "nobody else has died of it"
        assert post(f"{server.url}/v1/completions", body)["choices"][0]["token_ids"] == before
        assert server.stop() == 0
    assert f"{folder} was removed under the server" in server.stderr
    assert not list(tmp_path.glob("elastic-ep-*"))


def test_the_others_serve_on_without_the_folder_of_sockets(checkpoint, monkeypatch):
    with tempfile.TemporaryDirectory(prefix="eep") as place:
        monkeypatch.setenv("TMPDIR", place)
        options = ("--ep-size", "3", "--num-redundant-experts", "8", "--restart", "never")
        with ServerProcess(checkpoint("qwen3_moe"), *options) as server:
            (folder,) = Path(place).glob("elastic-ep-*")
            shutil.rmtree(folder)
            server.signal_rank(2)
            server.wait_status(lambda s: s["active_ranks"] == [1, 1, 0] and s["phase"] == "serving")
            assert post(f"{server.url}/v1/completions", {"model": server.facts["model"], "prompt": [1], "max_tokens": 5})["choices"]
            assert [rank["state"] for rank in server.status()["ranks"]] == ["active", "active", "dead"]
            assert server.stop() == 0


@pytest.mark.parametrize(("name", "locale"), [("x" * 80, {}), ("ü", {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})])
def test_a_folder_that_cannot_hold_sockets_is_one_line(checkpoint, tmp_path, monkeypatch, name, locale):
    folder = tmp_path / name
    folder.mkdir()
    for variable, value in {"TMPDIR": str(folder), **locale}.items():
        monkeypatch.setenv(variable, value)
    result = elastic_ep("serve", str(checkpoint("qwen3_moe")), "--port", "0")
    assert result.returncode == 2
    assert "set TMPDIR to another folder" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(folder.iterdir())


def test_standard_output_that_takes_nothing_does_not_end_the_server(checkpoint):
    command = [sys.executable, "-m", "elastic_ep.cli.main", "serve", str(checkpoint("qwen3_moe")), "--port", "0"]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process:
        try:
            assert "cannot say on standard output" in process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


def test_ranks_that_cannot_start_end_the_server(checkpoint):
    faults = [word for rank in range(2) for word in ("--fault", f"{rank}:dense_loaded:kill:1")]
    result = elastic_ep("serve", str(checkpoint("qwen3_moe")), "--port", "0", "--ep-size", "2", "--restart", "never", *faults)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("elastic-ep serve: error: no rank is left alive")


def test_a_rank_that_gets_no_memory_says_what_to_do(checkpoint):
    result = elastic_ep("serve", str(checkpoint("qwen3_moe")), "--port", "0", "--ep-size", "2", "--kv-tokens", str(10**14))
    assert result.returncode == 2
    assert "no memory for rank " in result.stderr
    assert "less --kv-tokens" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_client_that_leaves_frees_its_place(checkpoint):
    with ServerProcess(checkpoint("qwen3_moe"), "--ep-size", "2") as server:
        body = json.dumps({"model": server.facts["model"], "prompt": [1], "max_tokens": 500, "stream": True, "ignore_eos": True}).encode()
        request = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            answer.readline()
        status = server.wait_status(lambda status: status["requests"]["cancelled"] == 1)
        assert status["requests"]["running"] == 0


def test_sigterm_finishes_what_runs(checkpoint):
    with ServerProcess(checkpoint("qwen3_moe"), "--ep-size", "2") as server:
        answers = []
        body = {"model": server.facts["model"], "prompt": [1], "max_tokens": 300, "temperature": 0, "ignore_eos": True}
        thread = threading.Thread(target=lambda: answers.append(post(f"{server.url}/v1/completions", body | {"return_token_ids": True})))
        thread.start()
        server.wait_status(lambda status: status["tokens_committed"] > 10)
        assert server.stop() == 0
        thread.join(10)
        assert len(answers[0]["choices"][0]["token_ids"]) == 300
