"""The schema, and what schemathesis makes of it: requests of every kind that it allows, and of many that it does not."""

import os
import shutil
import subprocess

import pytest

from tests.helpers.served_processes import started_many, write_tiny
from tests.serve.test_replicas import free_ports

EXAMPLES = os.environ.get("RETNET_SCHEMA_EXAMPLES", "10")  # of each operation
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.slow
def test_no_request_that_schemathesis_thinks_of_breaks_the_server(tmp_path, tiny, tokenizer):
    """Its command, of an environment of its own (`pipx install schemathesis`); the seed is fixed."""
    command = shutil.which("schemathesis")
    if command is None:
        pytest.skip("schemathesis is not installed (pipx install schemathesis)")
    (port,) = free_ports(1)
    folder = write_tiny(tmp_path / "tiny", tiny, tokenizer)
    limits = ["--max-tokens", "50", "--sessions", tmp_path / "sessions", "--max-sessions", "100000"]
    with started_many(folder, [port], *limits) as (server,):
        words = [command, "run", f"http://127.0.0.1:{port}/openapi.json", "--checks", CHECKS, "--seed", "7"]
        words += ["--max-examples", EXAMPLES, "--workers", "2", "--request-timeout", "30", "--no-color"]
        found = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        print(found.stdout[-3000:])
        assert server.poll() is None
        assert found.returncode == 0, found.stdout + found.stderr
