"""A gradient's terms are summed while the next products run, and waited for where they are read, at the end or when
the fifth collective starts. A sum overwrites its terms where nobody else reads them."""


def before(
    tangent: "f32[8, 4] | input:0",
    x: "f32[8, 4] | input:1",
    w: "f32[4, 4] | parameter:fc.weight | on R",
):
    # forward: fc
    dx: "f32[8, 4] | on tp=P" = aten.mm.default(tangent, w)
    t: "f32[4, 8]{1, 4}" = aten.t.default(tangent)
    dw: "f32[4, 4] | on tp=P" = aten.mm.default(t, x)
    reduce_scatter: "f32[4, 2] | on tp=S1" = geminifx.reduce_scatter(dw, 1, 'tp', 2)
    all_reduce: "f32[8, 4] | on R" = geminifx.all_reduce(dx, 'tp', 'sum')
    d1: "f32[8, 4]" = aten.relu.default(all_reduce)
    reduce_scatter_1: "f32[4, 4]" = geminifx.reduce_scatter(d1, 0, 'tp', 2)
    d2: "f32[8, 4]" = aten.exp.default(d1)
    reduce_scatter_2: "f32[4, 4]" = geminifx.reduce_scatter(d2, 0, 'tp', 2)
    d3: "f32[8, 4]" = aten.exp.default(d2)
    all_reduce_1: "f32[8, 4]" = geminifx.all_reduce(d3, 'tp', 'max')
    d4: "f32[8, 4]" = aten.exp.default(d3)
    reduce_scatter_3: "f32[4, 4]" = geminifx.reduce_scatter(d4, 0, 'tp', 2)
    d5: "f32[8, 4]" = aten.exp.default(d4)
    return {"output:0": reduce_scatter, "output:1": reduce_scatter_1, "output:2": reduce_scatter_2, "output:3": all_reduce_1, "output:4": reduce_scatter_3, "output:5": d5}


def after(
    tangent: "f32[8, 4] | input:0",
    x: "f32[8, 4] | input:1",
    w: "f32[4, 4] | parameter:fc.weight | on R",
):
    # forward: fc
    dx: "f32[8, 4] | on tp=P" = aten.mm.default(tangent, w)
    start_all_reduce: "f32[8, 4]" = geminifx.start_all_reduce(dx, 'tp', 'sum')
    t: "f32[4, 8]{1, 4}" = aten.t.default(tangent)
    dw: "f32[4, 4] | on tp=P" = aten.mm.default(t, x)
    view: "f32[4, 2, 2]" = aten.view.default(dw, [4, 2, 2])
    permute: "f32[2, 4, 2]{2, 4, 1}" = aten.permute.default(view, [1, 0, 2])
    clone: "f32[2, 4, 2]" = aten.clone.default(permute, memory_format=torch.contiguous_format)
    view_1: "f32[8, 2]" = aten.view.default(clone, [8, 2])
    start_reduce_scatter: "f32[4, 2]" = geminifx.start_reduce_scatter(view_1, 'tp', 2)
    finish_collective: "f32[8, 4] | on R" = geminifx.finish_collective(start_all_reduce)
    d1: "f32[8, 4]" = aten.relu.default(finish_collective)
    start_reduce_scatter_1: "f32[4, 4]" = geminifx.start_reduce_scatter(d1, 'tp', 2)
    d2: "f32[8, 4]" = aten.exp.default(d1)
    start_reduce_scatter_2: "f32[4, 4]" = geminifx.start_reduce_scatter(d2, 'tp', 2)
    d3: "f32[8, 4]" = aten.exp.default(d2)
    clone_1: "f32[8, 4]" = aten.clone.default(d3, memory_format=torch.contiguous_format)
    start_all_reduce_1: "f32[8, 4]" = geminifx.start_all_reduce(clone_1, 'tp', 'max')
    d4: "f32[8, 4]" = aten.exp.default(d3)
    finish_collective_1: "f32[4, 2] | on tp=S1" = geminifx.finish_collective(start_reduce_scatter, view_1)
    start_reduce_scatter_3: "f32[4, 4]" = geminifx.start_reduce_scatter(d4, 'tp', 2)
    d5: "f32[8, 4]" = aten.exp.default(d4)
    finish_collective_2: "f32[4, 4]" = geminifx.finish_collective(start_reduce_scatter_1, d1)
    finish_collective_3: "f32[4, 4]" = geminifx.finish_collective(start_reduce_scatter_2, d2)
    finish_collective_4: "f32[8, 4]" = geminifx.finish_collective(start_all_reduce_1)
    finish_collective_5: "f32[4, 4]" = geminifx.finish_collective(start_reduce_scatter_3, d4)
    return {"output:0": finish_collective_1, "output:1": finish_collective_2, "output:2": finish_collective_3, "output:3": finish_collective_4, "output:4": finish_collective_5, "output:5": d5}
