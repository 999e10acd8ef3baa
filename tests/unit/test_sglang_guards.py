"""What the plug-in hides of a server's settings. Its other guards are tested on the real server."""

from ghostvis_cli.sglang.plugin.guards import hide_keys


def test_keys_are_starred_wherever_they_stand() -> None:
    said = {"api_key": "sesame", "admin_api_key": "treasure", "port": 1, "command": ["--api-key", "sesame"]}
    assert hide_keys(said) == {
        "api_key": "***", "admin_api_key": "***", "port": 1, "command": ["--api-key", "***"],
    }  # fmt: skip


def test_other_answers_stay_what_they_are() -> None:
    for answer in ([1], {"api_key": None}, {"version": "0.5.23"}, "text"):
        assert hide_keys(answer) is answer
