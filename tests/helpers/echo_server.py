"""A server that streams as OpenAI's API does, without a model."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Echo(BaseHTTPRequestHandler):
    """Streams the tokens that are asked for, as OpenAI's API does; the prompt "wrong" fails, "short" ends early."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("prompt") == "wrong":
            self.send_error(400, "no such prompt")
            return
        count = 1 if body.get("prompt") == "short" else body["max_tokens"]
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        key = "messages" in body
        for number in range(count):
            time.sleep(0.001)  # tokens that are read at once are no steps to time
            text = f"{len(body['messages'])}" if key else f"{number}"
            choice = {"delta": {"content": text}} if key else {"text": text}
            self.write(json.dumps({"choices": [choice]}))
        self.write(json.dumps({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": count}}))
        self.write("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def write(self, event):
        line = f"data: {event}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))

    def log_message(self, *_):
        pass


@contextmanager
def echo_server():
    """Its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
