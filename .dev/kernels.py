import gzip, json, sys, collections

for path in sys.argv[1:]:
    op = gzip.open if path.endswith(".gz") else open
    ev = json.load(op(path))["traceEvents"]
    k = [e for e in ev if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    t0, t1 = min(e["ts"] for e in k), max(e["ts"] + e["dur"] for e in k)
    print(path, "span ms", (t1 - t0) / 1e3)
    by = collections.defaultdict(lambda: [0, 0.0])
    streams = collections.defaultdict(float)
    for e in k:
        name = e["name"][:110]
        by[name][0] += 1
        by[name][1] += e["dur"] / 1e3
        streams[(e["cat"], e["args"].get("stream"))] += e["dur"] / 1e3
    for s, d in sorted(streams.items(), key=str):
        print("  stream", s, round(d, 2))
    for name, (n, d) in sorted(by.items(), key=lambda x: -x[1][1])[:28]:
        print(f"  {d:8.2f} ms {n:5d} {name}")
    # idle of the busiest kernel stream
    main = max((s for s in streams if s[0] == "kernel"), key=lambda s: streams[s])
    ks = sorted(
        (e["ts"], e["dur"], e["name"]) for e in k if e["args"].get("stream") == main[1] and e["cat"] == "kernel"
    )
    gaps = collections.Counter()
    end = ks[0][0]
    total = 0
    big = []
    for ts, d, name in ks:
        g = ts - end
        if g > 0:
            total += g
            if g > 100:
                big.append((round(g), round((ts - t0) / 1e3, 1), name[:60]))
        end = max(end, ts + d)
    print("  idle of main stream ms", total / 1e3, "gaps over 100us:", len(big), sum(b[0] for b in big) / 1e3)
    for b in sorted(big, reverse=True)[:12]:
        print("   ", b)
