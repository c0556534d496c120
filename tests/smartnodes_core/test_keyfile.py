from __future__ import annotations

import json
import os
import stat

import pytest

from smartnodes_core.chain.account import load_account_key, save_account_key
from smartnodes_core.config import UserConfig, load
from smartnodes_core.errors import IdentityError
from smartnodes_core.keyfile import MAX_KEY_FILE_BYTES, read_key_file, read_passphrase, write_key_file


def test_what_is_written_is_read_back_and_only_its_owner_may(tmp_path):
    path = tmp_path / "key.json"
    write_key_file(path, {"secret": "abc"})
    assert read_key_file(path) == {"version": 1, "secret": "abc"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_file_is_never_overwritten(tmp_path):
    path = tmp_path / "key.json"
    write_key_file(path, {"secret": "first"})
    with pytest.raises(IdentityError, match="never overwritten"):
        write_key_file(path, {"secret": "second"})
    assert read_key_file(path)["secret"] == "first"


def test_a_file_that_others_may_read_is_refused(tmp_path):
    path = tmp_path / "key.json"
    write_key_file(path, {"secret": "abc"})
    os.chmod(path, 0o640)
    with pytest.raises(IdentityError, match="chmod 600"):
        read_key_file(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', "x" * (MAX_KEY_FILE_BYTES + 1), "\xff"])
def test_what_is_no_key_file_is_refused(tmp_path, text):
    path = tmp_path / "key.json"
    path.write_text(text, encoding="latin-1")
    path.chmod(0o600)
    with pytest.raises(IdentityError, match="not a key file"):
        read_key_file(path)


def test_missing_files_and_folders_say_what_to_do(tmp_path):
    with pytest.raises(IdentityError, match="tensorlink keys"):
        read_key_file(tmp_path / "none.json")
    with pytest.raises(IdentityError, match="cannot be written"):
        write_key_file(tmp_path / "none" / "key.json", {})


def test_an_account_key_is_kept_with_the_account_it_gives(tmp_path):
    path = tmp_path / "account.json"
    save_account_key(path, bytes([7] * 32))
    assert load_account_key(path) == bytes([7] * 32)
    fields = json.loads(path.read_text())
    for changes in ({"account": "0x" + "0" * 40}, {"private_key": "zz"}, {"private_key": "00" * 32}):
        path.write_text(json.dumps({**fields, **changes}))
        with pytest.raises(IdentityError):
            load_account_key(path)


def test_a_key_file_of_another_kind_is_not_an_account(tmp_path):
    write_key_file(tmp_path / "key.json", {"seed": "00"})
    with pytest.raises(IdentityError, match="not the key file of an account"):
        load_account_key(tmp_path / "key.json")


def test_an_account_key_is_sealed_on_request(tmp_path):
    path, key = tmp_path / "account.json", bytes([7] * 32)
    save_account_key(path, key, "correct horse")
    assert key.hex() not in path.read_text()
    assert load_account_key(path, "correct horse") == key
    with pytest.raises(IdentityError, match="does not open"):
        load_account_key(path, "battery staple")
    with pytest.raises(IdentityError, match="passphrase_file"):
        load_account_key(path)


def test_a_passphrase_is_the_first_line_of_a_file_that_others_may_not_read(tmp_path):
    path = tmp_path / "passphrase"
    path.write_text("correct horse\nnot this\n")
    path.chmod(0o640)
    with pytest.raises(IdentityError, match="chmod 600"):
        read_passphrase(path)
    path.chmod(0o600)
    assert read_passphrase(path) == "correct horse"
    path.write_text("\n")
    with pytest.raises(IdentityError, match="is empty"):
        read_passphrase(path)
    with pytest.raises(IdentityError, match="cannot be read"):
        read_passphrase(tmp_path / "none")


def test_settings_name_the_file_with_the_passphrase(tmp_path):
    path = tmp_path / "passphrase"
    path.write_text("correct horse")
    path.chmod(0o600)
    assert load(UserConfig, env={}, flags={"passphrase_file": str(path)}).passphrase() == "correct horse"
    assert load(UserConfig, env={}).passphrase() is None
