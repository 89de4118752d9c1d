"""Who may ask, by which name, from which page; without a server."""

import asyncio

import httpx
import pytest

from rorqual.errors import UserError
from rorqual.serve.middleware import AuthMiddleware
from rorqual.serve.server import check_origins, read_keys


def ask(method="GET", path="/v1/models", headers=(), keys=(), host="127.0.0.1", origins=()):
    """The answer of a guarded application that answers everything with 200 and the method that it was asked with."""
    seen = []

    async def inner(scope, receive, send):
        seen.append(scope["method"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guard = AuthMiddleware(inner, keys, host, origins, 1000, 10.0, lambda scope, status: seen.append(status))

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, headers=headers)

    answer = asyncio.run(run())
    assert seen[-1] == answer.status_code
    answer.seen = seen
    return answer


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("127.0.0.1", 200),
        ("127.8.0.1:9", 200),
        ("localhost:8000", 200),
        ("LocalHost.:8000", 200),
        ("[::1]:8000", 200),
        ("mine.example", 200),
        ("mine.example:8443", 200),
        ("page.example:8000", 403),
        ("localhost.page.example", 403),
        ("127.0.0.1.page.example:8000", 403),
        ("page.example@localhost", 403),
        ("192.168.1.5:8000", 403),
        ("[::2]:8000", 403),
        ("0.0.0.0", 403),
        ("2130706433", 403),
        ("", 403),
        ("[", 403),
    ],
)
def test_a_local_server_is_asked_by_a_local_name(name, status):
    for path in ("/v1/models", "/", "/health"):
        answer = ask(path=path, headers={"Host": name}, origins=("https://mine.example",))
        assert answer.status_code == status
        assert status == 200 or "--allow-origin" in answer.json()["error"]["message"]


def test_elsewhere_a_name_or_a_key_may_be_any():
    assert ask(headers={"Host": "page.example"}, host="0.0.0.0").status_code == 200
    known = {"Host": "page.example", "Authorization": "Bearer k"}
    assert ask(headers=known, keys=("k",)).status_code == 200
    assert ask(headers={"Host": "page.example"}, keys=("k",)).status_code == 401


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8000", 200),
        ("http://localhost:3000", 200),
        ("https://localhost", 200),
        ("http://[::1]:5173", 200),
        ("https://mine.example", 200),
        ("http://mine.example", 403),
        ("https://page.example", 403),
        ("http://localhost.page.example", 403),
        ("http://localhost:3000.page.example", 403),
        ("file://", 403),
        ("null", 403),
    ],
)
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_page_of_others_does_not_use_the_server(origin, status, host):
    """A form, or fetch with text/plain, comes without having asked first."""
    settings = {"host": host, "origins": ("https://mine.example",)}
    answer = ask("POST", "/v1/chat/completions", {"Origin": origin, "Content-Type": "text/plain"}, **settings)
    assert answer.status_code == status
    assert answer.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
    first = {"Origin": origin, "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}  # fmt: skip
    for keys in ((), ("k",)):  # no key comes with this question
        asked = ask("OPTIONS", "/v1/chat/completions", first, keys=keys, **settings)
        assert asked.status_code == status
        assert asked.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
        assert status == 403 or "x-stainless-os" in asked.headers["access-control-allow-headers"]


def test_a_page_of_the_server_itself_may_ask_by_whatever_name():
    headers = {"Host": "box.lan:8000", "Origin": "http://box.lan:8000"}
    assert ask(headers=headers, host="0.0.0.0").status_code == 200
    assert ask(headers=headers, host="127.0.0.1").status_code == 403  # rebinding
    for name, origin, status in (
        ("Box.lan:443", "https://box.lan", 200),  # nginx's $host:$server_port
        ("box.lan", "http://box.lan:80", 200),
        ("box.lan:443", "http://box.lan", 403),
        ("box.lan:80", "https://box.lan", 403),
        ("", "null", 403),
    ):
        assert ask(headers={"Host": name, "Origin": origin}, host="0.0.0.0").status_code == status


def test_a_page_from_the_network_may_ask_this_machine_where_it_is_allowed():
    """Chrome asks first, with a header of its own."""
    first = {"Origin": "https://mine.example", "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Private-Network": "true"}  # fmt: skip
    answer = ask("OPTIONS", "/v1/chat/completions", first, origins=("https://mine.example",))
    assert (answer.status_code, answer.headers["access-control-allow-private-network"]) == (200, "true")
    assert ask("OPTIONS", "/v1/chat/completions", first).status_code == 403


def test_a_page_reads_why_it_is_refused_and_needs_a_key_as_all_do():
    answer = ask(headers={"Origin": "http://localhost:3000"}, keys=("k",))
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    known = {"Origin": "https://page.example", "Authorization": "Bearer k"}
    assert ask(headers=known, keys=("k",)).status_code == 200  # whoever has a key may ask


def test_head_is_a_get_without_a_body():
    assert ask("HEAD").seen == ["GET", 200]
    assert ask("HEAD", keys=("k",)).status_code == 401


def test_nothing_is_said_over_websockets():
    sent = []

    async def send(message):
        sent.append(message["type"])

    asyncio.run(AuthMiddleware(None, (), "127.0.0.1", (), 9, 9.0, None)({"type": "websocket"}, None, send))
    assert sent == ["websocket.close"]


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("first\n  # old: second\nthird\n", ("first", "third")),
        ("\ufefffirst\r\n\r\n\tsecond \r\n#x\r\n", ("first", "second")),
        ("a#b\n", ("a#b",)),
        ("a b\n", ("a b",)),
        ("a,b", ("a,b",)),
        ("clé\u2028é", None),
        ("first # the laptop's\n", None),
        ("a\tb\n", None),
        ("a\0b\n", None),
        ("# nothing\n\n", None),
        (" \n", None),
    ],
)
def test_keys_are_read_as_they_are_written(tmp_path, text, keys):
    path = tmp_path / "keys"
    path.write_bytes(text.encode())
    if keys is None:
        with pytest.raises(UserError, match="--api-keys") as refused:
            read_keys(path)
        assert "laptop" not in str(refused.value)
    else:
        assert read_keys(path) == keys


def test_a_file_of_keys_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin-1").write_text("clé", encoding="latin-1")
    for name in ("latin-1", "nothing", "."):
        with pytest.raises(UserError, match="--api-keys"):
            read_keys(tmp_path / name)
    (tmp_path / "utf-16").write_text("first", encoding="utf-16")  # as PowerShell writes
    assert read_keys(tmp_path / "utf-16") == ("first",)


def test_keys_from_the_environment(monkeypatch):
    for text, keys in (("a, b\nc,,", ("a", "b", "c")), ("", ()), ("a#b", ("a#b",))):
        monkeypatch.setenv("RORQUAL_API_KEYS", text)
        assert read_keys(None) == keys
    monkeypatch.setenv("RORQUAL_API_KEYS", " , ")
    with pytest.raises(UserError, match="RORQUAL_API_KEYS holds no key"):
        read_keys(None)


@pytest.mark.parametrize("sent", ["Bearer clé", "bearer  clé", "BEARER clé"])
def test_a_key_may_come_in_either_code(sent):
    for code in ("utf-8", "latin-1"):
        assert ask(headers={"Authorization": sent.encode(code)}, keys=("other", "clé")).status_code == 200
    for wrong in ("clé", "Basic clé", "Bearer cl", "Bearer", ""):
        assert ask(headers={"Authorization": wrong.encode()}, keys=("clé",)).status_code == 401


def test_origins_are_what_a_browser_says():
    given = ["HTTPS://Mine.example/", "tauri://localhost", "https://a.example:443", "http://a.example:443"]
    assert check_origins(given) == (
        "https://mine.example", "tauri://localhost", "https://a.example", "http://a.example:443",
    )  # fmt: skip
    for wrong in ("mine.example", "*", "https://mine.example/chat", "", "https://", "https://a b"):
        with pytest.raises(UserError, match="--allow-origin"):
            check_origins([wrong])
