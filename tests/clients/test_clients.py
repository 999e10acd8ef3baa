"""Real clients of OpenAI's API against a real server: `make clients` has them all, other runs what is installed.

GHOSTVIS_CLIENTS_URL names a server that runs, of any engine; without it the built-in model is served here by
the local engine. Answers are compared with those of plain HTTP, so that any model will do.
"""

import asyncio
import base64
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SERVER = os.environ.get("GHOSTVIS_CLIENTS_SERVER", str(Path(sys.executable).with_name("ghostvis")))
IMAGE = ROOT / "ghostvis_cli" / "demo" / "three-shapes.jpg"
DATA_URL = f"data:image/jpeg;base64,{base64.b64encode(IMAGE.read_bytes()).decode()}"
JAVASCRIPT = Path(__file__).parent / "javascript"
QUESTION = "What is in this picture?"
TEXT: Any = [{"role": "user", "content": "Who are you?"}]
SEEN: Any = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": DATA_URL}},
            {"type": "text", "text": QUESTION},
        ],
    }
]
GREEDY: Any = {"temperature": 0, "max_tokens": 40}
SCHEMA: Any = {
    "type": "object",
    "properties": {"answer": {"type": "string", "enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}


class Server:
    """Where it is, what it serves, and what it says over plain HTTP."""

    def __init__(self, url: str) -> None:
        self.url = f"{url.rstrip('/')}/v1"
        self.model: str = self._read("models")["data"][0]["id"]
        self.text, self.seen = self._answer(TEXT), self._answer(SEEN)

    def require_schemas(self) -> None:
        """Skips the test where the server gives no objects of a schema."""
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
        try:
            self._read("chat/completions", {"model": self.model, "messages": TEXT, "response_format": wanted})
        except urllib.error.HTTPError as error:
            pytest.skip(f"the server refuses response_format ({error.code})")

    def _answer(self, messages: Any) -> str:
        body = {"model": self.model, "messages": messages, **GREEDY}
        content: str = self._read("chat/completions", body)["choices"][0]["message"]["content"]
        return content

    def _read(self, route: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{route}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if url := os.environ.get("GHOSTVIS_CLIENTS_URL"):
        yield Server(url)
        return
    command = [SERVER, "serve", "--engine", "local", "--source", "demo", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield Server(json.loads(process.stdout.readline())["url"])
        finally:
            process.terminate()


# --- openai, Python


def test_openai_lists_models_answers_streams_and_sees(server: Server) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server.url, api_key="none")
    assert server.model in [model.id for model in client.models.list()]
    answered = client.chat.completions.create(model=server.model, messages=TEXT, **GREEDY)
    assert answered.choices[0].message.content == server.text
    pieces = client.chat.completions.create(model=server.model, messages=TEXT, stream=True, **GREEDY)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == server.text
    seen = client.chat.completions.create(model=server.model, messages=SEEN, **GREEDY)
    assert seen.choices[0].message.content == server.seen


def test_openai_gets_an_object_of_a_schema(server: Server) -> None:
    openai = pytest.importorskip("openai")
    server.require_schemas()
    client = openai.OpenAI(base_url=server.url, api_key="none")
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    answered = client.chat.completions.create(
        model=server.model, messages=TEXT, response_format=wanted, **GREEDY
    )
    assert json.loads(answered.choices[0].message.content)["answer"] in ("yes", "no")


# --- others, Python


def test_litellm_answers_streams_and_sees(server: Server) -> None:
    litellm = pytest.importorskip("litellm")
    about: Any = {"model": f"openai/{server.model}", "api_base": server.url, "api_key": "none", **GREEDY}
    assert litellm.completion(messages=TEXT, **about).choices[0].message.content == server.text
    pieces = litellm.completion(messages=TEXT, stream=True, **about)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == server.text
    assert litellm.completion(messages=SEEN, **about).choices[0].message.content == server.seen


def test_llm_answers_and_sees_by_its_command_line(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    name = "ghostvis"
    about = [{"model_id": name, "model_name": server.model, "api_base": server.url, "vision": True}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(about))  # YAML holds JSON
    env = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}

    def ask(*args: str) -> str:
        options = ["-m", name, "-o", "temperature", "0", "-o", "max_tokens", "40"]
        command = [sys.executable, "-m", "llm", "prompt", *args, *options]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert ask("Who are you?") == server.text.strip()
    assert ask("Who are you?", "--no-stream") == server.text.strip()
    assert ask(QUESTION, "-a", str(IMAGE))  # it puts the text before the image


def test_langchain_answers_streams_and_sees(server: Server) -> None:
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(base_url=server.url, api_key="none", model=server.model, **GREEDY)
    assert chat.invoke(TEXT).content == server.text
    assert "".join(piece.content for piece in chat.stream(TEXT)) == server.text
    assert chat.invoke(SEEN).content == server.seen


def test_langchain_gets_an_object_of_a_schema(server: Server) -> None:
    langchain = pytest.importorskip("langchain_openai")
    server.require_schemas()
    chat = langchain.ChatOpenAI(base_url=server.url, api_key="none", model=server.model, **GREEDY)
    shaped = chat.with_structured_output({"title": "answer", **SCHEMA}, method="json_schema")
    assert shaped.invoke(TEXT)["answer"] in ("yes", "no")


def of_pydantic_ai(server: Server, **options: Any) -> Any:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(server.model, provider=OpenAIProvider(base_url=server.url, api_key="none"))
    return Agent(model, model_settings=GREEDY, **options)


def test_pydantic_ai_answers_streams_and_sees(server: Server) -> None:
    ai = pytest.importorskip("pydantic_ai")
    agent = of_pydantic_ai(server)

    async def ask() -> tuple[str, str, str]:
        text = (await agent.run("Who are you?")).output
        async with agent.run_stream("Who are you?") as stream:
            streamed = await stream.get_output()
        image = ai.BinaryContent(IMAGE.read_bytes(), media_type="image/jpeg")
        return text, streamed, (await agent.run([image, QUESTION])).output

    assert asyncio.run(ask()) == (server.text, server.text, server.seen)


def test_pydantic_ai_gets_an_object_of_a_model(server: Server) -> None:
    ai = pytest.importorskip("pydantic_ai")
    server.require_schemas()
    from typing import Literal

    from pydantic import BaseModel

    class Answer(BaseModel):
        answer: Literal["yes", "no"]

    agent = of_pydantic_ai(server, output_type=ai.NativeOutput(Answer))
    assert agent.run_sync("Is it red?").output.answer in ("yes", "no")


def test_instructor_gets_an_object(server: Server) -> None:
    instructor = pytest.importorskip("instructor")
    server.require_schemas()
    from typing import Literal

    import openai
    from pydantic import BaseModel

    class Answer(BaseModel, extra="forbid"):  # else the schema lets a model add keys without end
        answer: Literal["yes", "no"]

    client = instructor.from_openai(
        openai.OpenAI(base_url=server.url, api_key="none"), mode=instructor.Mode.JSON_SCHEMA
    )
    found = client.chat.completions.create(
        model=server.model, messages=TEXT, response_model=Answer, max_retries=0, temperature=0, max_tokens=200
    )
    assert found.answer in ("yes", "no")


# --- JavaScript


@pytest.mark.parametrize("client", ["openai", "ai"])
def test_javascript_clients_answer_stream_and_see(client: str, server: Server) -> None:
    if shutil.which("node") is None or not (JAVASCRIPT / "node_modules" / client).is_dir():
        pytest.skip("needs node, and npm install in tests/clients/javascript")
    command = ["node", str(JAVASCRIPT / f"{client}.mjs"), server.url, server.model, DATA_URL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"text": server.text, "streamed": server.text, "seen": server.seen}
