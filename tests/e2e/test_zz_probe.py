import sys, time; sys.path.insert(0,'/work/main')
from tests.e2e.test_streams import *
import asyncio, random
def test_probe(checkpoint):
    family='qwen3_moe'
    rng = random.Random(1453491271)
    asked = prompts(32)
    victims = [0, *rng.sample([1, 2, 3], 2)]
    rng.shuffle(victims)
    with ServerProcess(checkpoint(family), "--ep-size", "4", "--num-redundant-experts", "2", "--prefill-chunk", "16") as server:
        und = asyncio.run(run_streams(server, asked))
        disturb = kill_at_random(server, victims, rng, len(asked) * COUNT)
        t=time.time()
        d = asyncio.run(run_streams(server, asked, disturb))
        print("took", time.time()-t, "total", len(asked)*COUNT)
        for i in range(6):
            s=server.status(); print(victims, s["active_ranks"], s["tokens_committed"], [(r["ranks"],r["kind"]) for r in s["recoveries"]]); time.sleep(.2)
    assert d==und
