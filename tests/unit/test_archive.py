"""The bundle to share: everything of the runs, and no secret."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
from backports.zstd import tarfile
from hypothesis import given
from hypothesis import strategies as st

from nemo_bench.errors import BenchError
from nemo_bench.record import folder as record
from nemo_bench.record.node import NODE
from nemo_bench.record.redaction import REMOVED, redact
from nemo_bench.report import archive, model
from nemo_bench.report.build import build_report

TINY = Path(__file__).parents[1] / "runs/nemo-2.7.3/fp32/tiny"
LOGS = Path(__file__).parents[1] / "logs"

# Put together here, so that no scanner of this repository takes them for real ones.
SECRETS = {
    "hugging face": "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    "nvidia": "nvapi-" + "x" * 20 + "-" + "Y" * 20,
    "github": "ghp_" + "a1B2" * 9,
    "aws": "AKIA" + "ABCDEFGHIJKLMNOP",
    "jwt": "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "c2lnbmF0dXJlLXNpZ25hdHVyZQ",
    "named": "0123456789abcdef0123456789abcdef",
    "password": "correct-horse-battery",
    "of the environment": "zq9-literal-value-of-a-variable",
    "url": "p4ssw0rd-in-url",
    "key": "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC",
}


def unpack(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Real run folders and a log with secrets in every place that could hold one."""
    monkeypatch.setenv("MY_REGISTRY_TOKEN", SECRETS["of the environment"])
    root = tmp_path / "results"
    run = Path(shutil.copytree(TINY / "1/20261122-160508-ecda", root / "run"))
    with open(run / record.CONFIG, "a") as file:
        file.write(f"\nHF_TOKEN: {SECRETS['hugging face']}\n")
    about, node = (json.loads((run / name).read_text()) for name in (record.RUN, NODE))
    about["overrides"].append(f"+cluster.env.WANDB_API_KEY={SECRETS['named']}")
    node["environment"] |= {"HF_TOKEN": SECRETS["hugging face"], "NCCL_DEBUG": "INFO"}
    (run / record.RUN).write_text(json.dumps(about))
    (run / NODE).write_text(json.dumps(node))
    log = (run / "rank0.out").read_text().splitlines()
    log[3:3] = [
        f"Authorization: Bearer {SECRETS['jwt']}",
        f"export NGC_API_KEY='{SECRETS['nvidia']}'",
        f"cloning https://user:{SECRETS['url']}@example.org/repository",
        f'{{"db_password": "{SECRETS["password"]}", "x": 1}}',
        f"login with {SECRETS['github']} and {SECRETS['aws']}",
        f"the value is {SECRETS['of the environment']}",
        "-----BEGIN RSA PRIVATE KEY-----",
        SECRETS["key"],
        SECRETS["key"],
        "-----END RSA PRIVATE KEY-----",
    ]
    (run / "rank0.out").write_text("\n".join(log) + "\n")
    (run / "submit.sbatch").write_text(f"#!/bin/bash\nexport HF_TOKEN={SECRETS['hugging face']}\nsrun x\n")
    (run / "checkpoints").mkdir()
    (run / "checkpoints/weights.pt").write_bytes(b"\x00" * 100)
    shutil.copy(LOGS / "nemo2.out", root / "bare.log")
    with open(root / "bare.log", "a") as file:
        file.write(f"token={SECRETS['hugging face']}")  # without an end of line
    return root


def test_no_secret_is_in_a_bundle(planted: Path, tmp_path: Path) -> None:
    report = build_report([planted], baseline=[planted])
    target = tmp_path / "share/out.tar.zst"
    archive.write(report, target, {"results.json": model.to_json(report)})
    whole = b"\n".join(unpack(target).values())
    raw = b"\n".join(path.read_bytes() for path in planted.rglob("*") if path.is_file())
    for name, secret in SECRETS.items():
        assert secret.encode() in raw, f"{name} was not planted"
        assert secret.encode() not in whole, name
    assert REMOVED.encode() in whole


def test_everything_else_is_in_the_bundle(planted: Path, tmp_path: Path) -> None:
    report = build_report([planted])
    target = tmp_path / "out.tar.zst"
    size = archive.write(report, target, {"results.json": model.to_json(report)})
    assert size == target.stat().st_size
    files = unpack(target)
    assert files["runs/run/steps.jsonl"] == (planted / "run" / record.STEPS).read_bytes()
    assert b"NCCL_DEBUG" in files["runs/run/node.json"] and b"train_step_timing in s" in files["runs/run/rank0.out"]
    assert files["runs/run/submit.sbatch"].decode() == f"#!/bin/bash\nexport HF_TOKEN={REMOVED}\nsrun x\n"
    assert files["runs/bare.log"].startswith((LOGS / "nemo2.out").read_bytes())
    manifest = json.loads(files[archive.MANIFEST])
    assert manifest["left_out"] == ["runs/run/checkpoints"]
    assert {*manifest["removals"]} == {*files} - {archive.MANIFEST}
    assert manifest["removals"]["runs/run/rank0.out"] == 9  # a private key of four lines is one
    assert manifest["removals"]["runs/run/steps.jsonl"] == 0
    # What was packed can be reported on.
    for name, content in files.items():
        path = tmp_path / "unpacked" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    again = build_report([tmp_path / "unpacked/runs"])
    assert [run.times for run in again.runs] == [run.times for run in report.runs]


def test_a_full_disk_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.tar.zst"
    target.write_bytes(b"the old one")

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(BenchError, match=r"out\.tar\.zst: cannot be written \(No space left on device\)"):
        archive.write(build_report([TINY]), target, {})
    assert [path.name for path in tmp_path.iterdir()] == ["out.tar.zst"] and target.read_bytes() == b"the old one"


def test_links_out_of_a_run_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("not to be shared")
    run = Path(shutil.copytree(TINY / "1/20261122-165153-d39a", tmp_path / "run"))
    (run / "notes.txt").symlink_to(tmp_path / "private.txt")
    archive.write(build_report([run]), tmp_path / "out.tar.zst", {})
    assert b"not to be shared" not in b"".join(unpack(tmp_path / "out.tar.zst").values())


NO_SECRETS = """
total_tokens: 1e12
total_tokens=1000000000000.0
tokens_per_s: 9678.2
TOKENIZERS_PARALLELISM=False
tokenizer: /data/tokenizer
num_tokens: 5
eos_token: <|end_of_text|>
train_step_timing in s: 0.3569
https://example.org/a:b@c
a secret is kept
author: somebody
authority=/etc/ssl
"""

NAMED_SECRETS = """
HF_TOKEN=verysecret
hf_token: verysecret
"HF_TOKEN": "verysecret",
export NGC_API_KEY='verysecret'
+cluster.env.MY_PASSWORD=verysecret
AWS_SECRET_ACCESS_KEY = verysecret
MY_PRIVATE=verysecret
BASIC_AUTH: verysecret
proxy-authorisation: verysecret
Authorization: Bearer verysecret-verysecret
git clone https://me:verysecret@example.org/x
"""


def test_secrets_are_removed_by_name_and_nothing_else() -> None:
    assert redact(NO_SECRETS) == NO_SECRETS
    for line in NAMED_SECRETS.strip().splitlines():
        assert "verysecret" not in redact(line) and REMOVED in redact(line)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a\n-----BEGIN PRIVATE KEY-----\nMII-x\ny\n-----END PRIVATE KEY-----\nb", f"a\n{REMOVED}\nb"),
        ("a\nrank 0: -----BEGIN RSA PRIVATE KEY-----\nrank 0: MII\ncut off", f"a\nrank 0: {REMOVED}"),
    ],
)
def test_a_private_key_goes_whole_over_all_its_lines(text: str, clean: str) -> None:
    assert redact(text) == clean


@given(st.sampled_from(["hugging face", "nvidia", "github", "aws", "jwt"]), st.text(max_size=30), st.text(max_size=30))
def test_known_forms_are_removed_anywhere_and_at_once(name: str, before: str, after: str) -> None:
    clean = redact(f"{before} {SECRETS[name]} {after}")
    assert SECRETS[name] not in clean and redact(clean) == clean
