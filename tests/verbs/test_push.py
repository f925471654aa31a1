"""Pushing results to the Hub: the real client against a server on the loopback."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import modelmerge
from modelmerge.checkpoint.shard_file import ShardFile
from modelmerge.errors import HubError, OutputError
from modelmerge.hub import ranges
from modelmerge.hub.upload import Uploader, parse_target, upload
from modelmerge.progress import Silent
from tests.support.checkpoints import family
from tests.support.commands import refused, run
from tests.support.hub_server import OWNER, READER, FakeHub
from tests.support.processes import running

# The client's own, of the HTTP library it is built on.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def _owner(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    monkeypatch.setenv("HF_TOKEN", OWNER)
    monkeypatch.setattr(ranges, "_PAUSES", (0.01, 0.01, 0.01))


@pytest.fixture
def local(tmp_path: Path) -> list[Path]:
    """[base, expert_0, expert_1] on disk."""
    return family(tmp_path / "local", experts=2)


def test_a_merge_is_pushed_and_its_url_is_what_a_script_gets(
    hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, said, err = run(capsys, "merge", "ties", *local, "-o", out, "--push", "org/merged", "-q")
    assert (code, said, err) == (0, f"{hub.endpoint}/org/merged\n", "")
    pushed = hub.files("org/merged")
    for file in (f for f in out.iterdir() if f.name not in ("README.md", "modelmerge.json")):
        assert pushed[file.name] == file.read_bytes()
    assert pushed.keys() - {".gitattributes"} == {file.name for file in out.iterdir()}
    repo = hub.repos["org/merged"]
    assert repo.messages == ["initial commit", "Merge of 2 experts by ties"]
    assert not repo.private
    # And it is a model like any other there.
    told = modelmerge.merge("org/merged", local[1:2], tmp_path / "again", method="average")
    assert told["recipe"]["base"] == {"name": "merged", "reference": f"org/merged@{repo.refs['main']}"}


def test_what_is_said_of_a_push(
    hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("merge", "ties", *local, "-o", tmp_path / "out", "--push", "org/merged")
    code, out, _ = run(capsys, *words, "--dry-run")
    assert code == 0
    assert "push to org/merged new\n" in out
    assert "org/merged" not in hub.repos, "a dry run makes nothing"
    code, out, _ = run(capsys, *words, "--json")
    outcome = json.loads(out)
    assert outcome["url"] == f"{hub.endpoint}/org/merged"
    assert outcome["commit"] == hub.repos["org/merged"].refs["main"]
    code, out, _ = run(capsys, *words, "--dry-run", "--json", "--force")
    assert json.loads(out)["plan"]["push"] == {
        "repository": "org/merged", "new": False, "private": False, "pull_request": False}  # fmt: skip
    code, out, _ = run(capsys, *words, "--force")
    assert f"pushed to {hub.endpoint}/org/merged\n" in out


def test_an_output_is_pushed_later(
    hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modelmerge.merge(local[0], local[1:], tmp_path / "out", method="average")
    words = ("push", tmp_path / "out", "org/merged")
    code, out, err = run(capsys, *words, "--private", "--commit-message", "A first try", "--json")
    assert code == 0, err
    repo, url = hub.repos["org/merged"], f"{hub.endpoint}/org/merged"
    assert json.loads(out) == {"output": str(tmp_path / "out"), "url": url, "commit": repo.refs["main"]}
    assert (repo.messages[-1], repo.private) == ("A first try", True)
    assert run(capsys, *words, "-q") == (0, f"{url}\n", "")
    assert run(capsys, *words)[1] == f"pushed to {url}\n"
    assert "holds no finished output" in refused(capsys, "push", local[0], "org/other")[0]
    assert "org/other" not in hub.repos


def test_nothing_pushed_tells_of_this_machine(
    hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sha = hub.add("org/expert", local[1])
    monkeypatch.chdir(tmp_path)
    given = [local[0], "org/expert", "secret=local/expert_1"]
    assert run(capsys, "merge", "ties", *given, "-o", tmp_path / "out", "--push", "org/merged")[0] == 0
    assert run(capsys, "extract", *given, "-o", tmp_path / "vectors", "--push", "org/vectors")[0] == 0
    assert run(capsys, *AS_LORA[:2], *given, *AS_LORA[2:], "-o", tmp_path / "adapter", "--push", "org/adapter")[0] == 0
    for repo in ("org/merged", "org/vectors", "org/adapter"):
        for name, content in hub.files(repo).items():
            for place in (str(tmp_path), "local/", "hf-cache", "modelmerge-hub-"):
                assert place.encode() not in content, (repo, name)
    manifest = json.loads(hub.files("org/merged")["modelmerge.json"])
    assert manifest["recipe"]["base"] == {"name": "base", "reference": "base"}
    assert manifest["recipe"]["experts"] == [
        {"name": "expert", "reference": f"org/expert@{sha}"}, {"name": "secret", "reference": "secret"}]  # fmt: skip
    assert f" base expert=org/expert@{sha} secret --" in manifest["command"]
    assert manifest["command"].endswith(" -o out")
    digest = json.loads((tmp_path / "out" / "modelmerge.json").read_bytes())["inputs"]["base"]["files"]
    assert manifest["inputs"]["base"]["files"] == {"base/model.safetensors": next(iter(digest.values()))}
    card = hub.files("org/merged")["README.md"].decode()
    assert "| `secret` | `secret` |" in card
    assert "[org/expert](https://huggingface.co/org/expert)" in card
    # At home all is as it was, so that the merge can be replayed.
    assert str(local[0]) in (tmp_path / "out" / "modelmerge.json").read_text()
    assert modelmerge.replay(tmp_path / "out", tmp_path / "again")


PLACES = ("/home/alice", "C:\\\\Users", "/mnt/data", "../alice", "alice")
CONFIG = {
    "_name_or_path": "/home/alice/runs/first", "model_type": "tiny", "auto_map": {"AutoModel": "org/code--m.Model"},
    "text_config": {"_name_or_path": "C:\\Users\\alice\\second", "hidden_size": 16}, "tied": None,
    "vision_config": {"_name_or_path": "openai/clip-vit-base-patch32", "data": ["/mnt/data/alice.json", "x/y"]},
}  # fmt: skip
TOKENIZER = {
    "name_or_path": "../alice/third", "tokenizer_file": "/home/alice/.cache/tokenizer.json", "bos_token": "<s>",
    "added_tokens_decoder": {"1": {"content": "/usr/bin/env"}}, "chat_template": "/{{ x }}/y/z", "unk": "/",
}  # fmt: skip


def configured(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    (directory / "preprocessor_config.json").write_text('{"image_processor_type":  "x"}')


def tells_nothing(files: dict[str, bytes], *places: str) -> None:
    for name, content in files.items():
        for place in (*PLACES, *places):
            assert place.encode() not in content, (name, place)


def test_no_config_tells_where_models_lay(
    hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configured(local[0])
    adapter = write_adapter(tmp_path / "lora", "/home/alice/other_base")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score.py").write_text("def score(model):\n    return 0.5\n")
    models = [local[0], local[1], adapter]
    merge, script = ("merge", "average", *models), f"{tmp_path}/score.py:score"
    for words, repo in (
        ((*merge, "-o", "out"), "org/merged"),
        ((*merge, "--as-lora", "4", "-o", "adapter", "--include", "*q_proj*"), "org/adapter"),
        (("extract", *models, "-o", "vectors"), "org/vectors"),
        (("disentangle", "awd", *models, "-o", "apart", "--experts"), "org/apart"),
        (("search", "ties", *models, "-o", "best", "--try", "scale=0.1,0.2", "--on", f"custom:{script}"), "org/best"),
    ):  # fmt: skip
        code, _, err = run(capsys, *words)
        assert code == 0, err
        out = words[words.index("-o") + 1]
        if out == "out":  # what an earlier version left, and what people put beside it
            (tmp_path / out / "config.json").write_text(json.dumps(CONFIG))
            code, said, _ = run(capsys, "eval", "custom", tmp_path / out, "--base", local[0], "--script", script,
                                "--json", "--update-card", "--report", f"{out}/today.html")  # fmt: skip
            (tmp_path / out / "today.json").write_text(said)
        assert run(capsys, "push", out, repo)[0] == 0
        tells_nothing(hub.files(repo), str(tmp_path), tmp_path.name)
        there = tmp_path / "there" / repo
        for name, content in hub.files(repo).items():
            (there / name).parent.mkdir(parents=True, exist_ok=True)
            (there / name).write_bytes(content)
        code, said, err = run(capsys, "verify", there, "--json")
        assert code == 0, "what was pushed is what its manifest says"
        assert any(file["same"] for file in json.loads(said)["files"])
    pushed = hub.files("org/merged")
    config = json.loads(pushed["config.json"])
    assert config["_name_or_path"] == "first"
    assert config["text_config"] == {"_name_or_path": "second", "hidden_size": 16}
    assert config["vision_config"] == {"_name_or_path": "openai/clip-vit-base-patch32", "data": ["x/y"]}
    assert (config["auto_map"], config["tied"]) == (CONFIG["auto_map"], None)
    tokenizer = json.loads(pushed["tokenizer_config.json"])
    assert tokenizer == {key: value for key, value in TOKENIZER.items() if key != "tokenizer_file"} | {
        "name_or_path": "third"}  # fmt: skip
    assert pushed["preprocessor_config.json"] == (local[0] / "preprocessor_config.json").read_bytes()
    assert b"it says it was trained on 'other_base'" in pushed["modelmerge.json"]
    # At home, too, nothing tells paths but what a replay needs.
    tells_nothing({file.name: file.read_bytes() for file in (tmp_path / "best").iterdir() if "config" in file.name})


def write_adapter(directory: Path, base: str) -> Path:
    directory.mkdir()
    key = "base_model.model.model.layers.0.q_proj"
    save_file({f"{key}.lora_A.weight": torch.ones(2, 16), f"{key}.lora_B.weight": torch.ones(16, 2) / 99},
              directory / "adapter_model.safetensors")  # fmt: skip
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "base_model_name_or_path": base,
        "target_modules": ["q_proj"],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("name", ["my out=1", "a\n# h", "\x1b[31m\u202e", "b\udcff", "x" * 255], ids=ascii)
def test_outputs_of_any_name_are_pushed(
    name: str, hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expert = local[1].rename(tmp_path / name)
    code, _, err = run(
        capsys, "merge", "average", local[0], expert, "-o", tmp_path / "o" / name, "--push", "org/merged"
    )
    assert code == 0, err
    manifest = json.loads(hub.files("org/merged")["modelmerge.json"])
    assert manifest["recipe"]["experts"] == [{"name": name, "reference": name}]
    hub.files("org/merged")["README.md"].decode()
    assert not any(str(tmp_path).encode() in content for content in hub.files("org/merged").values())
    if name.isprintable():
        return
    assert run(capsys, "extract", local[0], expert, "-o", tmp_path / "v")[0] == 0
    assert "no file can be called" in refused(capsys, "push", tmp_path / "v", "org/vectors")[0]
    assert "org/vectors" not in hub.repos


def test_a_link_out_of_an_output_is_not_pushed(
    hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modelmerge.merge(local[0], local[1:], tmp_path / "out", method="average")
    (tmp_path / "id_rsa").write_text("secret")
    (tmp_path / "out" / "notes.txt").symlink_to("../id_rsa")
    error, hint = refused(capsys, "push", tmp_path / "out", "org/merged")
    assert "notes.txt is a link that leads out of" in error
    assert hint == "put the file itself in its place, or remove the link"


def test_a_pushed_recipe_is_replayed_by_who_has_the_models(
    hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/expert", local[1])
    words = (
        "merge",
        "ties",
        local[0],
        "org/expert",
        f"mine={local[2]}",
        "-o",
        tmp_path / "out",
        "--push",
        "org/merged",
    )
    assert run(capsys, *words)[0] == 0
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(local[0], elsewhere / "base")
    shutil.copytree(local[2], elsewhere / "mine")
    (elsewhere / "modelmerge.json").write_bytes(hub.files("org/merged")["modelmerge.json"])
    monkeypatch.chdir(elsewhere)
    assert run(capsys, "merge", "--recipe", "modelmerge.json", "-o", "again")[0] == 0
    assert Path("again/model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    shutil.rmtree("again")
    shutil.copytree(local[1], "mine", dirs_exist_ok=True)
    code, _, err = run(capsys, "merge", "--recipe", "modelmerge.json", "-o", "again")
    assert code == 1
    assert "not the file that the recipe was made with" in err


def test_access_is_checked_before_the_work(
    hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in local:
        hub.add(f"org/{directory.name}", directory)
    hub.add("org/merged", {"README.md": b"taken"})
    words = ["org/base", "org/expert_0", "org/expert_1", "-o", tmp_path / "out", "--push"]
    for verb in (["merge", "ties"], ["extract"], ["disentangle", "awd"]):
        monkeypatch.setenv("HF_TOKEN", READER)
        error, hint = refused(capsys, *verb, *words, "org/merged")
        assert "org/merged: your token may not do this: You don't have write access" in error
        assert "settings/tokens" in hint
        assert "may not do this: You don't have the rights to create" in refused(capsys, *verb, *words, "org/new")[0]
        monkeypatch.delenv("HF_TOKEN")
        assert refused(capsys, *verb, *words, "org/merged")[0] == "pushing to org/merged needs a token"
    assert not [r for r in hub.asked("GET /cdn") if r.range is None], "weights were downloaded for nothing"
    assert not (tmp_path / "out").exists()
    assert hub.repos.keys() == {"org/base", "org/expert_0", "org/expert_1", "org/merged"}


def test_a_bad_plan_makes_no_repository(
    hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    words = (*local, "-o", tmp_path / "out", "--push", "org/new")
    for verb in (["merge", "ties"], ["extract"], ["disentangle", "awd"]):
        assert "is not empty" in refused(capsys, *verb, *words)[0]
        assert run(capsys, *verb, *words, "--include", "nothing*", "--force")[0] == 2
    assert not hub.repos


def test_private_repositories(
    hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/public", {"README.md": b"for all"})
    words = ("merge", "average", *local, "-o", tmp_path / "out", "--private", "--push")
    error, hint = refused(capsys, *words, "org/public")
    assert error == "--private, but org/public exists and is public"
    assert "/org/public/settings" in hint
    assert run(capsys, *words, "org/secret")[0] == 0
    assert hub.repos["org/secret"].private
    assert run(capsys, *words, "org/secret", "--force")[0] == 0, "it stays as private as it is"


def test_weights_of_an_older_model_go_with_the_same_commit(
    hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    stale += [
        "pytorch_model.bin",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tf_model.h5",
        "model.fp16.safetensors",
    ]
    kept = ["model-q4.gguf", "training_args.bin", "LICENSE", "original/model.safetensors", "notes[1].md"]
    before = hub.add("org/merged", dict.fromkeys([*stale, *kept, "config.json"], b"old"))
    words = ("merge", "average", *local, "-o", tmp_path / "out", "--push", "org/merged")
    assert run(capsys, *words)[0] == 0
    repo = hub.repos["org/merged"]
    assert next(iter(repo.commits)) == before
    assert len(repo.commits) == 2, "one commit does it all"
    after = hub.files("org/merged")
    assert not after.keys() & set(stale)
    assert after.keys() == {*kept, *(file.name for file in (tmp_path / "out").iterdir())}
    assert after["config.json"] == (local[0] / "config.json").read_bytes()
    # From one file to shards, and the index is not a stale one.
    assert run(capsys, *words, "--max-shard-size", "4kB", "--force")[0] == 0
    now = hub.files("org/merged").keys()
    assert "model.safetensors" not in now
    assert "model.safetensors.index.json" in now
    assert {file.name for file in (tmp_path / "out").glob("*.safetensors")} <= now


def test_a_pull_request_needs_no_write_access(
    hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hub.add("org/merged", {"README.md": b"theirs"})
    monkeypatch.setenv("HF_TOKEN", READER)
    modelmerge.merge(local[0], local[1:], tmp_path / "out", method="average")
    words = ("push", tmp_path / "out", "--create-pr")
    assert "org/none is not a repository on the Hub" in refused(capsys, *words, "org/none")[0]
    code, out, _ = run(capsys, *words, "org/merged", "-q")
    assert (code, out) == (0, f"{hub.endpoint}/org/merged/discussions/1\n")
    assert hub.repos["org/merged"].refs["main"] == before
    assert "model.safetensors" in hub.files("org/merged", "refs/pr/1")
    # The owner goes on in the same pull request.
    monkeypatch.setenv("HF_TOKEN", OWNER)
    words = ("merge", "ties", *local, "-o", tmp_path / "out", "--force", "-q", "--push", "org/merged@refs/pr/1")
    code, out, _ = run(capsys, *words)
    assert (code, out) == (0, f"{hub.endpoint}/org/merged/tree/refs/pr/1\n")
    assert hub.repos["org/merged"].refs["main"] == before
    assert hub.repos["org/merged"].messages[-1] == "Merge of 2 experts by ties"
    error, hint = refused(capsys, *words[:-1], "org/merged@dev")
    assert error == "org/merged has no revision 'dev'"
    assert hint == "it has: main"


AS_LORA = ["merge", "average", "--as-lora", "2", "--include", "*_proj.weight"]


@pytest.mark.parametrize("verb", [["merge", "ties"], AS_LORA, ["extract"], ["disentangle", "awd", "--experts"]])
def test_an_upload_that_failed_is_taken_up_without_the_work(
    verb: list[str], hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    out = tmp_path / "out"
    hub.fail("PUT /lfs", status=500, times=1000)
    words = (*verb, *local, "-o", out, "--push", "org/result")
    code, said, err = run(capsys, *words)
    assert (code, said) == (1, "")
    errors = [line for line in err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert errors[0] == "error: org/result: the Hub answered 500"
    assert errors[1] == f"hint: {out} is complete: `modelmerge push {out} org/result` goes on from here"
    assert (out / "modelmerge.json").exists()
    assert hub.files("org/result").keys() == {".gitattributes"}, "nothing half-pushed"
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    hub.faults.clear()
    code, said, err = run(capsys, *words, "--resume")
    assert code == 0
    assert f"note: {out} is complete already" in err
    assert f"pushed to {hub.endpoint}/org/result" in said
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
    files = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert files == hub.files("org/result").keys() - {".gitattributes"}


# --- while the merge goes on ---


def test_weight_files_are_uploaded_as_they_are_finished(
    hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, finished = ShardFile.finish, []

    def wait(file: ShardFile) -> str:
        if len(finished) == 2:
            hub.until(lambda: bool(hub.stored.keys() & set(finished)))
        finished.append(finish(file))
        return finished[-1]

    monkeypatch.setattr(ShardFile, "finish", wait)
    out = tmp_path / "out"
    words = ("merge", "ties", *local, "-o", out, "--max-shard-size", "4kB", "--push", "org/merged", "-q")
    assert run(capsys, *words)[::2] == (0, "")
    assert len(finished) == 3
    assert hub.repos["org/merged"].messages == ["initial commit", "Merge of 2 experts by ties"]
    for file in out.glob("*.safetensors"):
        assert hub.files("org/merged")[file.name] == file.read_bytes()
    puts = [request.path for request in hub.asked("PUT /lfs")]
    assert sorted(puts) == sorted(f"/lfs/{digest}" for digest in finished), "each is sent once"


def test_an_early_upload_that_fails_is_made_up_for_by_the_commit(
    hub: FakeHub, local: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add("org/merged", {})
    hub.fail("POST .*preupload", status=403)
    notes: list[str] = []

    class Notes(Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    target, file = parse_target("org/merged"), local[0] / "model.safetensors"
    with Uploader(target, Notes()) as uploader:
        uploader.add("model.safetensors", file)
        hub.until(lambda: bool(hub.asked("POST .*preupload")))
    assert [note.partition(":")[0] for note in notes] == [
        "model.safetensors goes with the commit, for its upload failed"
    ]
    assert not hub.asked("PUT /lfs")
    upload(target, local[0], {}, "by hand", progress=False)
    assert hub.files("org/merged")["model.safetensors"] == file.read_bytes()


def test_processes_that_share_a_merge_upload_and_one_commits(
    hub: FakeHub, local: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    words = ["merge", "ties", *map(str, local), "-o", str(out), "--max-shard-size", "4kB", "--cluster", "files"]
    words += ["--push", "org/merged"]
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(running(words, hub=True, beside=i)) for i in range(2)]
        assert [one.end() for one in runs] == [0, 0], [one.err() for one in runs]
        told = [one.out() for one in runs]
    assert hub.repos["org/merged"].messages == ["initial commit", "Merge of 2 experts by ties"]
    assert hub.files("org/merged").keys() - {".gitattributes"} == {file.name for file in out.iterdir()}
    pushed = [f"pushed to {hub.endpoint}/org/merged" in text for text in told]
    # Who comes when all is done finds nothing to commit.
    others = ["the process that put it in place pushes it" in text for text in told]
    assert any(pushed)
    assert all(a != b for a, b in zip(pushed, others, strict=True)), told


def test_resume_takes_up_only_the_same_and_undamaged_output(local: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = modelmerge.merge(local[0], local[1:], out, method="ties")
    assert modelmerge.merge(local[0], local[1:], out, method="ties", resume=True) == first
    with pytest.raises(OutputError, match="not empty"):
        modelmerge.merge(local[0], local[1:], out, method="ties", density=0.1, resume=True)
    with pytest.raises(OutputError, match="not empty"):
        modelmerge.merge(local[0], {"a": local[1], "b": local[2]}, out, method="ties", resume=True)
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)
    with pytest.raises(OutputError, match="not empty"):
        modelmerge.merge(local[0], local[1:], out, method="ties", resume=True)
    again = modelmerge.merge(local[0], local[1:], out, method="ties", resume=True, force=True)
    assert again["files"]["model.safetensors"] == first["files"]["model.safetensors"]


def test_pushed_task_vectors_stand_for_their_experts(
    hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for directory in local:
        hub.add(f"org/{directory.name}", directory)
    remote = ["org/base", "org/expert_0", "org/expert_1"]
    code, out, _ = run(capsys, "extract", *remote, "-o", tmp_path / "vectors", "--push", "org/vectors", "-q")
    assert (code, out) == (0, f"{hub.endpoint}/org/vectors\n")
    assert hub.repos["org/vectors"].messages[-1] == "Task vectors of 2 experts"
    code, out, _ = run(capsys, "disentangle", "awd", *remote, "-o", tmp_path / "apart", "--push", "org/apart", "--json")
    assert json.loads(out)["url"] == f"{hub.endpoint}/org/apart"
    assert "redundant/model.safetensors" in hub.files("org/apart")
    assert hub.repos["org/apart"].messages[-1] == "Disentangled task vectors of 2 experts"
    vectors = [f"hf://org/vectors/expert_{i}" for i in range(2)]
    told = modelmerge.merge("org/base", vectors, tmp_path / "there", method="task-arithmetic", stream=True)
    modelmerge.merge(local[0], local[1:], tmp_path / "here", method="task-arithmetic")
    assert (tmp_path / "there/model.safetensors").read_bytes() == (tmp_path / "here/model.safetensors").read_bytes()
    sha = hub.repos["org/vectors"].refs["main"]
    references = [expert["reference"] for expert in told["recipe"]["experts"]]
    assert references == [f"hf://org/vectors/expert_{i}@{sha}" for i in range(2)]


def test_transformers_loads_what_was_pushed(hub: FakeHub, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    for i, name in enumerate(("base", "one", "two")):
        torch.manual_seed(i)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name, max_shard_size="20kB")
        hub.add(f"org/{name}", tmp_path / name)
    modelmerge.merge("org/base", ["org/one", "org/two"], tmp_path / "out", method="average", stream=True)
    modelmerge.push(tmp_path / "out", "org/merged")
    tokens = torch.arange(10)[None]
    logits = [AutoModelForCausalLM.from_pretrained(which)(tokens).logits for which in ("org/merged", tmp_path / "out")]
    assert torch.equal(*logits)


def test_push_in_python(hub: FakeHub, local: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(local[0], local[1:], tmp_path / "out", method="average")
    done = modelmerge.push(tmp_path / "out", "org/merged", private=True, commit_message="by hand")
    assert done == {"url": f"{hub.endpoint}/org/merged", "commit": hub.repos["org/merged"].refs["main"]}
    assert hub.repos["org/merged"].messages[-1] == "by hand"
    with pytest.raises(OutputError, match="no finished output"):
        modelmerge.push(local[0], "org/other")
    hub.fail("POST /api/repos/create", status=403)
    with pytest.raises(HubError, match="your token may not do this"):
        modelmerge.push(tmp_path / "out", "org/other")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--private"], "--private has no effect without --push REPO"),
        (["--push", "merged"], "'merged' is no repository"),
        (["--push", "org/merged/sub"], "'org/merged/sub' is no repository"),
    ],
)
def test_what_cannot_be_meant_is_wrong_usage(
    words: list[str], says: str, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in (["merge", "ties"], ["extract"], ["disentangle", "awd"]):
        code, out, err = run(capsys, *verb, *local, "-o", tmp_path / "out", *words)
        assert (code, out) == (2, "")
        assert says in err


def test_a_pull_request_is_against_the_main_branch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "push", tmp_path, "org/merged@dev", "--create-pr")
    assert (code, out) == (2, "")
    assert "--create-pr opens a pull request against the main branch" in err
