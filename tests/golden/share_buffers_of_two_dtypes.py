"""Buffers of one dtype are exchanged together, those with gaps as dense ones; a count of steps is alike as it is."""


def before(
    x: "f32[4] | input:0",
    k: "f32[] | input:1",
    n: "i64[] | input:2",
    mean: "f32[4] | buffer:bn.mean",
    count: "i64[] | buffer:bn.count",
    seen: "i64[] | buffer:bn.seen",
    table: "f32[2, 3] | buffer:bn.table",
    tangent: "f32[4] | tangent:0",
):
    # forward: bn
    new_mean: "f32[4]" = aten.add.Tensor(mean, x)
    new_count: "i64[]" = aten.add.Tensor(count, 1)
    new_seen: "i64[]" = aten.add.Tensor(seen, n)
    t: "f32[3, 2]{1, 3}" = aten.t.default(table)
    turned: "f32[3, 2]{1, 3}" = aten.add.Tensor(t, k)
    y: "f32[4]" = aten.mul.Tensor(x, k)
    # backward: bn
    dx: "f32[4]" = aten.mul.Tensor(tangent, k)
    return {"output:0": y, "mutation:bn.mean": new_mean, "mutation:bn.count": new_count, "mutation:bn.seen": new_seen, "mutation:bn.table": turned, "gradient:input:0": dx}


def after(
    x: "f32[4] | input:0",
    k: "f32[] | input:1",
    n: "i64[] | input:2",
    mean: "f32[4] | buffer:bn.mean",
    count: "i64[] | buffer:bn.count",
    seen: "i64[] | buffer:bn.seen",
    table: "f32[2, 3] | buffer:bn.table",
    tangent: "f32[4] | tangent:0",
):
    # forward: bn
    new_mean: "f32[4]" = aten.add.Tensor(mean, x)
    new_count: "i64[]" = aten.add.Tensor(count, 1)
    new_seen: "i64[]" = aten.add.Tensor(seen, n)
    t: "f32[3, 2]{1, 3}" = aten.t.default(table)
    turned: "f32[3, 2]{1, 3}" = aten.add.Tensor(t, k)
    y: "f32[4]" = aten.mul.Tensor(x, k)
    # forward
    view: "f32[4]" = aten.view.default(new_mean, [-1])
    clone: "f32[3, 2]" = aten.clone.default(turned, memory_format=torch.contiguous_format)
    view_1: "f32[6]" = aten.view.default(clone, [-1])
    cat: "f32[10]" = aten.cat.default([view, view_1])
    broadcast: "f32[10]" = geminifx.broadcast(cat)
    slice_1: "f32[4]" = aten.slice.Tensor(broadcast, 0, 0, 4)
    view_2: "f32[4]" = aten.view.default(slice_1, [4])
    slice_2: "f32[6]" = aten.slice.Tensor(broadcast, 0, 4, 10)
    view_3: "f32[3, 2]" = aten.view.default(slice_2, [3, 2])
    view_4: "i64[1]" = aten.view.default(new_seen, [-1])
    broadcast_1: "i64[1]" = geminifx.broadcast(view_4)
    slice_3: "i64[1]" = aten.slice.Tensor(broadcast_1, 0, 0, 1)
    view_5: "i64[]" = aten.view.default(slice_3, [])
    # backward: bn
    dx: "f32[4]" = aten.mul.Tensor(tangent, k)
    return {"output:0": y, "mutation:bn.mean": view_2, "mutation:bn.count": new_count, "mutation:bn.seen": view_5, "mutation:bn.table": view_3, "gradient:input:0": dx}
