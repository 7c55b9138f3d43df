//! Random changes of a region tree, compared with a naive answer to "what is at this address".

use std::sync::Arc;

use addr::Gpa;
use arbitrary::{Result, Unstructured};
use memory::space::{
    Difference, Enabled, FlatView, Mmio, Protection, RegionId, RegionKind, Space, SpaceError,
};

/// Addresses that trees of this test reach.
const SPAN: u64 = 64;
const MAX_REGIONS: usize = 12;

struct Nothing;

impl Mmio for Nothing {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

/// A region as the model knows it.
#[derive(Clone)]
struct Node {
    id: RegionId,
    size: u64,
    target: Option<(usize, u64)>,
    device: bool,
    enabled: bool,
    /// Parent, offset, priority, and when it was placed.
    place: Option<(Option<usize>, u64, i32, usize)>,
}

/// The tree again, without any cleverness.
#[derive(Clone, Default)]
struct Model {
    nodes: Vec<Node>,
    clock: usize,
}

impl Model {
    /// Which region shows at `at` within the region (or the root), and which byte of it.
    fn look(&self, within: Option<usize>, at: i128) -> Option<(RegionId, u64)> {
        if let Some(node) = within.map(|w| &self.nodes[w])
            && (!node.enabled || at < 0 || at >= i128::from(node.size))
        {
            return None;
        }
        let mut children: Vec<_> = self
            .nodes
            .iter()
            .enumerate()
            .filter_map(|(i, n)| {
                n.place
                    .filter(|p| p.0 == within)
                    .map(|p| (p.2, p.3, p.1, i))
            })
            .collect();
        children.sort_by_key(|(priority, clock, ..)| (*priority, *clock));
        let child = children
            .iter()
            .rev()
            .find_map(|(_, _, offset, i)| self.look(Some(*i), at - i128::from(*offset)));
        child.or_else(|| {
            let node = &self.nodes[within?];
            match node.target {
                Some((target, offset)) => self.look(Some(target), at + i128::from(offset)),
                None => node.device.then_some((node.id, at as u64)),
            }
        })
    }
}

/// Changes a tree until the bytes are used up, and compares. Returns how many transactions.
pub(crate) fn compare_with_model(data: &[u8]) -> usize {
    let mut u = Unstructured::new(data);
    let space = Space::new();
    let mut model = Model::default();
    let mut count = 0;
    while !u.is_empty() {
        let before = space.view();
        let mut changed = model.clone();
        let Ok(committed) = transact(&mut u, &space, &mut changed) else {
            break;
        };
        if let Some(difference) = committed {
            model = changed;
            check_difference(&before, &space.view(), &difference);
        }
        compare(&space.view(), &model);
        count += 1;
    }
    count
}

/// A few changes; committed or abandoned.
fn transact(
    u: &mut Unstructured<'_>,
    space: &Space,
    model: &mut Model,
) -> Result<Option<Difference>> {
    let mut t = space.transaction();
    for _ in 0..u.int_in_range(1..=3)? {
        change(u, space, &mut t, model)?;
    }
    if u.ratio(1, 10)? {
        return Ok(None);
    }
    match t.commit() {
        Ok(difference) => Ok(Some(difference)),
        Err(SpaceError::TooComplex(_)) => Ok(None),
        Err(error) => panic!("{error}"),
    }
}

fn change(
    u: &mut Unstructured<'_>,
    space: &Space,
    t: &mut memory::space::Transaction<'_>,
    model: &mut Model,
) -> Result<()> {
    let len = model.nodes.len();
    if len < MAX_REGIONS && (len == 0 || u.ratio(1, 3)?) {
        return add(u, t, model);
    }
    let index = u.choose_index(len)?;
    let id = model.nodes[index].id;
    match u.int_in_range(0..=3)? {
        0 => {
            t.unplace(id).unwrap();
            model.nodes[index].place = None;
        }
        1 => {
            let enabled = u.arbitrary()?;
            t.set_enabled(id, if enabled { Enabled::Yes } else { Enabled::No })
                .unwrap();
            model.nodes[index].enabled = enabled;
        }
        _ => place(u, space, t, model, index)?,
    }
    Ok(())
}

fn add(
    u: &mut Unstructured<'_>,
    t: &mut memory::space::Transaction<'_>,
    model: &mut Model,
) -> Result<()> {
    let size = u.int_in_range(1..=SPAN)?;
    let kind = u.int_in_range(0..=2)?;
    let target = match model.nodes.len() {
        0 => None,
        len if kind == 0 => Some((u.choose_index(len)?, u.int_in_range(0..=SPAN)?)),
        _ => None,
    };
    let (kind, device) = match (target, kind) {
        (Some((i, offset)), _) => (
            RegionKind::Alias {
                target: model.nodes[i].id,
                offset,
            },
            false,
        ),
        (None, 1) => (RegionKind::Container, false),
        (None, _) => (RegionKind::Mmio(Arc::new(Nothing)), true),
    };
    let id = t.region("region", size, kind).unwrap();
    t.set_protection(id, Protection::ReadOnly).unwrap();
    let node = Node {
        id,
        size,
        target,
        device,
        enabled: true,
        place: None,
    };
    model.nodes.push(node);
    Ok(())
}

fn place(
    u: &mut Unstructured<'_>,
    space: &Space,
    t: &mut memory::space::Transaction<'_>,
    model: &mut Model,
    index: usize,
) -> Result<()> {
    let parent = match u.int_in_range(0..=model.nodes.len())? {
        0 => None,
        n => Some(n - 1),
    };
    let offset = u.int_in_range(0..=SPAN)?;
    let priority = u.int_in_range(-1..=1)?;
    let parent_id = parent.map_or(space.root(), |p| model.nodes[p].id);
    match t.place(parent_id, model.nodes[index].id, offset, priority) {
        Ok(()) => {
            model.clock += 1;
            model.nodes[index].place = Some((parent, offset, priority, model.clock));
        }
        Err(SpaceError::Placed(_)) => assert!(model.nodes[index].place.is_some()),
        Err(SpaceError::Cycle { .. }) => assert!(parent.is_some()),
        Err(error) => panic!("{error}"),
    }
    Ok(())
}

fn compare(view: &FlatView, model: &Model) {
    view.check_invariants();
    for at in 0..SPAN * 4 {
        let gpa = Gpa::new(at);
        let seen = view
            .find(gpa)
            .map(|r| (r.region, r.offset + r.range.offset_of(gpa).unwrap()));
        assert_eq!(seen, model.look(None, i128::from(at)), "at {at}: {view:?}");
    }
}

/// Taking the removed ranges out of the old view and adding the new ones gives the new view.
fn check_difference(before: &FlatView, after: &FlatView, difference: &Difference) {
    let key = |r: &memory::space::FlatRange| (r.range.start(), r.range.len(), r.region, r.offset);
    let mut ranges: Vec<_> = before.ranges().iter().map(key).collect();
    let removed: Vec<_> = difference.removed.iter().map(key).collect();
    ranges.retain(|r| !removed.contains(r));
    ranges.extend(difference.added.iter().map(key));
    ranges.sort();
    let expected: Vec<_> = after.ranges().iter().map(key).collect();
    assert_eq!(ranges, expected);
}
