//! The machine's control socket: from before the machine is built until the process ends, so that
//! its name holds through resets.

use std::sync::Arc;

use anyhow::Result;
use control::{Directory, Server, Start, Vm};
use vmm::Machine;

use super::options::{Name, Plan};

/// The socket and what stands behind it.
pub(super) struct Control {
    vm: Arc<Vm>,
    _server: Option<Server>,
}

impl Control {
    /// Takes the machine's name. A name that the user gave must be free; with one of our own making
    /// the machine runs also where nobody can reach it.
    pub(super) fn open(plan: &Plan) -> Result<Self> {
        let vm = Vm::new(plan.name.as_str());
        let server = match (serve(&plan.name, &vm), &plan.name) {
            (Ok(server), _) => Some(server),
            (Err(error), Name::Given(_)) => return Err(error),
            (Err(error), Name::Made(_)) => {
                eprintln!("fourfold: the machine runs without a control socket: {error:#}");
                None
            }
        };
        Ok(Self {
            vm,
            _server: server,
        })
    }

    /// A machine has been built and will run now; it is reachable while the answer lives.
    pub(super) fn attach(&self, plan: &Plan, machine: &Machine) -> Result<Attached<'_>> {
        self.vm.attach(machine.remote(), plan.start)?;
        Ok(Attached(&self.vm))
    }
}

fn serve(name: &Name, vm: &Arc<Vm>) -> Result<Server> {
    let claim = Directory::of_user()?.claim(name.as_str())?;
    Ok(Server::start(claim, vm.clone(), Start::Now)?)
}

/// A machine that can be reached.
pub(super) struct Attached<'a>(&'a Vm);

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        self.0.detach();
    }
}
