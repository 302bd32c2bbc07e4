"""`elastic-ep serve`: an OpenAI-compatible server over N ranks of this host."""

from __future__ import annotations

import argparse
import json
import logging
import socket
import sys
from typing import TYPE_CHECKING, Any

from elastic_ep.cli.token import TOKEN_VARIABLE, read_token
from elastic_ep.core.errors import InvalidInputError

if TYPE_CHECKING:
    from elastic_ep.serving.config import ServeConfig
    from elastic_ep.serving.remote import RemoteRanks


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve a checkpoint over an OpenAI-compatible API",
        description="Serve a Hugging Face Mixture-of-Experts checkpoint over N rank processes. Any rank may die at any moment: its "
        "requests move, their streams stay open, and every client gets the tokens that it would have got.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", help="folder with config.json and safetensors files, as save_pretrained writes it")
    parser.add_argument("--ep-size", type=int, default=1, metavar="N", help="ranks to spread the experts over")
    parser.add_argument("--num-redundant-experts", type=int, default=0, metavar="R", help="slots per layer beyond one per expert")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 picks a free one")
    parser.add_argument("--served-model-name", metavar="NAME", help="name clients use; the folder's name if not given")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="type to compute in; the checkpoint's if not given")
    device_help = "where ranks compute; with cuda, rank r takes GPU r of its host, counted round, so that several may share one"
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help=device_help)
    dispatch_help = (
        "how tokens reach experts. socket: a mesh of sockets, on any host, also between ranks on GPUs (through pinned memory). cuda: "
        "peers' GPU memory, read in place by kernels; for one host with a GPU for each rank. mooncake: Mooncake EP's masked kernels over "
        "NVLink or RDMA, bfloat16; rank 0's death ends its group; one rank alone was run on hardware here. nixl: NIXL EP's, not run on "
        "hardware here"
    )
    parser.add_argument("--dispatch", choices=["socket", "cuda", "mooncake", "nixl"], default="socket", help=dispatch_help)
    ib_help = "RDMA devices for --dispatch mooncake: names with commas between, or JSON that maps GPU numbers to names; all if not given"
    parser.add_argument("--mooncake-ib-device", default="", metavar="NAMES", help=ib_help)
    parser.add_argument("--max-model-len", type=int, metavar="TOKENS", help="longest prompt + completion; default: all that fits")
    parser.add_argument("--kv-tokens", type=int, default=32768, metavar="TOKENS", help="KV cache of each rank")
    parser.add_argument("--max-num-seqs", type=int, default=64, metavar="N", help="sequences at home on one rank at once")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512, metavar="TOKENS", help="positions one rank computes in a step")
    parser.add_argument("--prefill-chunk", type=int, default=128, metavar="TOKENS", help="positions of one prompt computed in a step")
    parser.add_argument("--max-waiting", type=int, default=1024, metavar="N", help="requests that may wait; one more gets 429")
    parser.add_argument(
        "--when-short",
        choices=["stream", "refuse"],
        default="stream",
        help="when the living slots cannot hold all experts: read the rest in as needed (slow, correct), or answer 503",
    )
    restart_help = "start a new process for a dead rank; it rejoins while the others serve"
    parser.add_argument("--restart", choices=["always", "never"], default="always", help=restart_help)
    rate_help = "what background loading may read on each rank; 0: no limit"
    parser.add_argument("--rebalance-bytes-per-second", type=float, default=0.0, metavar="BYTES", help=rate_help)
    backup_help = "keep a copy of all experts in this host's memory, so that lost ones need no disk; its size is logged at start"
    parser.add_argument("--host-backup", choices=["off", "experts"], default="off", help=backup_help)
    staging_help = "what a rank may hold beside its slots while experts move in the background; on a GPU it is taken at the start"
    parser.add_argument("--staging-bytes", type=int, default=1 << 30, metavar="BYTES", help=staging_help)
    scrub_help = "how fast a rank looks whether its slots still hold what was verified; 0: never"
    parser.add_argument("--scrub-bytes-per-second", type=float, default=32e6, metavar="BYTES", help=scrub_help)
    reads_help = (
        "experts of other ranks, all on this host's CPUs: copied out of their memory (process_vm_readv) where the system permits, or sent "
        "over sockets, as with --device cuda and --remote-ranks"
    )
    parser.add_argument("--peer-reads", choices=["memory", "socket"], default="memory", help=reads_help)
    interval_help = "how often to look whether another placement would serve the recorded expert loads better; 0: never"
    parser.add_argument("--rebalance-interval", type=float, default=60.0, metavar="SECONDS", help=interval_help)
    gain_help = "by what share the busiest ranks must get faster for experts to be moved"
    parser.add_argument("--rebalance-min-gain", type=float, default=0.05, metavar="SHARE", help=gain_help)
    trace_help = "write the recorded expert loads there when the server stops; `elastic-ep plan` reads it"
    parser.add_argument("--load-trace", metavar="FILE.npz", help=trace_help)
    drain_help = "requests of a rank that leaves on purpose: compute them again elsewhere, or let them finish first"
    parser.add_argument("--drain", choices=["move", "finish"], default="move", help=drain_help)
    _add_remote(parser)
    parser.add_argument("--step-timeout", type=float, default=10.0, metavar="SECONDS", help="a step this long has a hung rank in it")
    parser.add_argument("--heartbeat-timeout", type=float, default=0.9, metavar="SECONDS", help="silence after which a rank is looked at")
    parser.add_argument("--start-timeout", type=float, default=300.0, metavar="SECONDS", help="time for a rank to read dense weights")
    backoff_help = "wait before a dead rank's seat gets a new process; doubled while they die quickly"
    parser.add_argument("--restart-backoff", type=float, default=0.5, metavar="SECONDS", help=backoff_help)
    parser.add_argument("--restart-backoff-max", type=float, default=30.0, metavar="SECONDS", help="the longest such wait")
    parser.add_argument("--shutdown-timeout", type=float, default=30.0, metavar="SECONDS", help="time for running requests at SIGTERM")
    parser.add_argument("--fast-math", action="store_true", help="fastest kernels; tokens may then depend on the batch")
    fault_help = "for tests: make a rank fail at a named point"
    parser.add_argument("--fault", action="append", default=[], metavar="RANK:POINT:ACTION[:NTH]", help=fault_help)
    file_help = "for tests: a file of faults that running ranks read whenever it changes"
    parser.add_argument("--fault-file", default="", metavar="FILE", help=file_help)
    parser.add_argument("--log-level", choices=["DEBUG", "INFO", "WARNING", "ERROR"], default="WARNING", help="what to log")
    parser.add_argument("--json", action="store_true", help="print one JSON object when serving begins, instead of a line of text")


def _add_remote(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ranks on other hosts", "each host joins with: elastic-ep rank --controller tcp://HOST:PORT")
    remote_help = "give the last N ranks to the host whose agent calls itself NODE; several with commas"
    group.add_argument("--remote-ranks", action="append", default=[], metavar="NODE=N", help=remote_help)
    group.add_argument("--control-listen", metavar="tcp://HOST:PORT", help="where other hosts reach the controller")
    group.add_argument("--token-file", metavar="FILE", help=f"file with the token that both sides must know, or ${TOKEN_VARIABLE}")
    group.add_argument("--node", metavar="LABEL", help="label of this host's failure domain; its name if not given")
    group.add_argument("--mesh-host", metavar="HOST", help="address at which other hosts reach this host's ranks; --control-listen's host")
    wait_help = "how long to wait for other hosts at start before serving without them; they may come later"
    group.add_argument("--remote-wait", type=float, default=60.0, metavar="SECONDS", help=wait_help)


def _remote(args: argparse.Namespace) -> RemoteRanks | None:
    from elastic_ep.serving.remote import RemoteRanks, parse_nodes

    if not args.remote_ranks:
        for name in ("control_listen", "token_file", "node", "mesh_host"):
            if getattr(args, name) is not None:
                raise InvalidInputError(f"--{name.replace('_', '-')} is for ranks on other hosts; say which by --remote-ranks NODE=N")
        return None
    if args.control_listen is None:
        raise InvalidInputError("--remote-ranks needs --control-listen tcp://HOST:PORT, where the other hosts reach the controller")
    return RemoteRanks(
        nodes=parse_nodes(args.remote_ranks),
        control_listen=args.control_listen,
        token=read_token(args.token_file),
        node=args.node or socket.gethostname(),
        mesh_host=args.mesh_host or "",
        wait_s=args.remote_wait,
    )


def make_config(args: argparse.Namespace) -> ServeConfig:
    """The server's configuration. Raises InvalidInputError for values that no checkpoint could make right."""
    from elastic_ep.serving.config import ServeConfig

    return ServeConfig(
        checkpoint=args.checkpoint,
        ep_size=args.ep_size,
        num_redundant_experts=args.num_redundant_experts,
        dtype=args.dtype,
        fast_math=args.fast_math,
        device=args.device,
        dispatch=args.dispatch,
        mooncake_ib_device=args.mooncake_ib_device,
        kv_tokens=args.kv_tokens,
        max_sequences=args.max_num_seqs,
        max_batch_tokens=args.max_num_batched_tokens,
        prefill_chunk=args.prefill_chunk,
        max_waiting=args.max_waiting,
        max_model_len=args.max_model_len,
        served_model_name=args.served_model_name,
        when_short=args.when_short,
        restart=args.restart,
        rebalance_bytes_per_s=args.rebalance_bytes_per_second,
        host_backup=args.host_backup,
        staging_bytes=args.staging_bytes,
        rebalance_interval_s=args.rebalance_interval,
        rebalance_min_gain=args.rebalance_min_gain,
        load_trace=args.load_trace,
        drain=args.drain,
        scrub_bytes_per_s=args.scrub_bytes_per_second,
        peer_reads=args.peer_reads,
        step_timeout_s=args.step_timeout,
        heartbeat_timeout_s=args.heartbeat_timeout,
        log_level=args.log_level,
        remote=_remote(args),
        faults=_faults(args.fault),
        fault_file=args.fault_file,
        start_timeout_s=args.start_timeout,
        restart_backoff_s=args.restart_backoff,
        restart_backoff_max_s=args.restart_backoff_max,
    )


def _faults(texts: list[str]) -> dict[int, list[dict[str, Any]]]:
    faults: dict[int, list[dict[str, Any]]] = {}
    for text in texts:
        parts = text.split(":")
        if len(parts) not in (3, 4) or not parts[0].isdigit() or (len(parts) == 4 and not parts[3].isdigit()):
            raise InvalidInputError(f"--fault {text!r}: give RANK:POINT:ACTION or RANK:POINT:ACTION:NTH, as 2:step_begin:kill:10")
        faults.setdefault(int(parts[0]), []).append({"point": parts[1], "action": parts[2], "nth": int(parts[3]) if len(parts) == 4 else 1})
    return faults


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT. Returns 0 after a clean stop, 1 when no rank was left."""
    from elastic_ep.serving.server import serve

    logging.basicConfig(level=args.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = make_config(args)

    def announce(facts: dict[str, Any]) -> None:
        text = (
            f"elastic-ep: serving {facts['model']} on {facts['url']}: {facts['ep_size']} ranks, {facts['slots']} slots for "
            f"{facts['experts']} experts in each of {facts['layers']} layers"
        )
        try:
            print(json.dumps(facts) if args.json else text, flush=True)
        except OSError as error:  # nobody reads it; clients may all the same
            logging.getLogger(__name__).warning("cannot say on standard output that serving begins: %s", error.strerror)
            sys.stdout = None  # what is left in its buffer is not to be tried again at the end

    return serve(config, args.host, args.port, args.shutdown_timeout, announce)
