"""One person's session with the explorer, over the same requests that its page makes."""

import json
import secrets
from pathlib import Path

import httpx


class Refused(Exception):
    """What the page would show as an error."""


class Session:
    """Uploads files and calls the functions of the page.

    Args:
        url: Address of the page.
        login: Name and password, if it needs them.
    """

    def __init__(self, url, login=None):
        self.client = httpx.Client(base_url=url, timeout=120, trust_env=False)
        if login is not None:
            answer = self.client.post("/login", data=dict(zip(("username", "password"), login, strict=True)))
            answer.raise_for_status()
        config = self.client.get("/config")
        config.raise_for_status()
        self.config, self.hash = config.json(), secrets.token_hex(8)
        self.api = self.config.get("api_prefix", "")

    def component(self, elem_id):
        return next(c["id"] for c in self.config["components"] if c["props"].get("elem_id") == elem_id)

    def function(self, elem_id, event):
        """Return the number of the function that an event of a component starts."""
        target = [self.component(elem_id), event]
        return next(f["id"] for f in self.config["dependencies"] if target in [list(t) for t in f["targets"]])

    def upload(self, path, name=None):
        with Path(path).open("rb") as file:
            answer = self.client.post(f"{self.api}/upload", files={"files": (name or Path(path).name, file)})
        if answer.status_code != 200:
            raise Refused(f"{answer.status_code}: {answer.text}")
        return answer.json()[0]

    def call(self, function, data, **more):
        """Call a function and return what it gives; raise Refused with the message of an error."""
        request = {"data": data, "fn_index": function, "session_hash": self.hash, "trigger_id": None, **more}
        answer = self.client.post(f"{self.api}/queue/join", json=request)
        if answer.status_code != 200:
            raise Refused(f"{answer.status_code}: {answer.text}")
        told = []
        with self.client.stream("GET", f"{self.api}/queue/data", params={"session_hash": self.hash}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                told += [message["log"]] if message.get("msg") == "log" else []
                if message.get("msg") == "process_completed" and told:
                    raise Refused(told[0])
                if message.get("msg") == "process_completed":
                    if not message["success"]:
                        raise Refused(str(message["output"].get("error")))
                    return message["output"]["data"]
        raise Refused("the server said nothing")

    def open(self, path, name=None):
        """Drop a picture; return its name and the predictions by class."""
        file = {"path": self.upload(path, name), "orig_name": Path(path).name, "meta": {"_type": "gradio.FileData"}}
        found = self.call(self.function("upload", "upload"), [file])
        shares = {each["label"]: each["confidence"] for each in found[3]["confidences"]}
        return found[2], shares

    def get(self, path):
        return self.client.get(f"{self.api}{path}")
