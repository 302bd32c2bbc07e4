"""What the demo asks its model: sixteen beginnings of Python and of Python's documentation, of different lengths.

None ends in white space: a token begins with the space before its word.
"""

from __future__ import annotations

from pathlib import Path

PROMPTS = (
    'import os\nimport sys\nimport json\n\n\ndef read_config(path):\n    """Return the settings that the file holds as a dictionary.',
    "class TestQueue(unittest.TestCase):\n\n    def setUp(self):\n        self.queue = queue.Queue(maxsize=4)\n\n    def test_",
    'The "with" statement\n********************\n\nThe "with" statement is used to wrap the execution of a block with',
    'def main(argv=None):\n    parser = argparse.ArgumentParser(description="Count the words of a file.")\n    parser.add_argument(',
    'class Connection:\n    """Talks to a server.\n\n    Hosts have names or addresses.\n    """\n\n    def __init__(self, host, port',
    '    def close(self):\n        """Close the file. A closed file can\'t be read or written any more."""',
    "The following exceptions are raised when a file cannot be read:",
    "def test_sort_is_stable(self):\n    data = [(random.randrange(10), i) for i in range(100)]",
    "class Node(object):\n\n    def __init__(self, name, parent=None):\n        self.name = name\n        self.parent = parent\n\n    def",
    "    async def read_line(self):\n        while not self._buffer:\n            await self._wait_for_data()",
    "Functions\n*********\n\nA function is called with a list of arguments. If an argument has a default value,",
    "    def __eq__(self, other):\n        if not isinstance(other, Point):\n            return NotImplemented",
    "    def test_write_after_close(self):\n        f = self.open(self.filename, 'wb')\n        f.write(b'spam')",
    'def parse_header(line):\n    """Split a header line into its name and its value.\n\n    Raise ValueError if',
    "    def run(self):\n        while True:\n            task = self.tasks.get()\n            if task is None:\n                break",
    "# Helper functions for the tests of the module.\n\nimport threading\n\nlock = threading.Lock()\n\ndef",
)


def encoded_prompts(checkpoint: Path) -> list[list[int]]:
    """PROMPTS as token ids of the checkpoint's tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]
