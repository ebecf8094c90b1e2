//! Virtual machine monitors, as sessions that send what each of them sends, in its order and with its flags, and that a
//! guest's disk must come through: I/O, pause, reboot, a daemon that goes and comes back. Each file says from which
//! source it was read; where a monitor is built on the `vhost` crate, its profile is too.

mod cloud_hypervisor;
mod crosvm;
mod dragonball;
mod firecracker;
mod openvmm;
mod qemu;
mod raw;
mod vhost_crate;

use std::path::Path;
use std::sync::Arc;

use crate::backend::Setup;
use crate::frontend::blk::{Config, OK, Request, feature};
use crate::frontend::device::lay_out;
use crate::frontend::memory::{GuestMemory, USUAL};
use crate::frontend::queue::Queue;
use crate::image::{Image, pattern};

/// What Linux's virtio_blk and virtio_ring accept of what they are offered.
const LINUX: u64 = feature::SIZE_MAX
    | feature::SEG_MAX
    | feature::RO
    | feature::BLK_SIZE
    | feature::FLUSH
    | feature::TOPOLOGY
    | feature::CONFIG_WCE
    | feature::MQ
    | feature::DISCARD
    | feature::WRITE_ZEROES
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::VERSION_1
    | feature::ACCESS_PLATFORM;

/// A guest: its memory, its queues, and what its driver has accepted.
struct Guest {
    memory: Arc<GuestMemory>,
    queues: Vec<Queue>,
    accepted: u64,
}

impl Guest {
    /// A guest whose driver takes what it knows of the features offered.
    fn boot(queues: u16, offered: u64) -> Self {
        let memory = Arc::new(GuestMemory::new(&USUAL));
        let accepted = offered & LINUX;
        let queues = lay_out(&memory, queues, 128, accepted);
        Self { memory, queues, accepted }
    }

    /// The driver sets up its rings anew, as after a reset.
    fn reset(&mut self) {
        self.queues.iter_mut().for_each(Queue::reset);
    }

    fn user_address(&self, guest: u64) -> u64 {
        self.memory.user_address(guest)
    }
}

/// A monitor's side of one device.
trait Vmm: Sized {
    /// The most queues that its guests use.
    const QUEUES: u16;

    /// What it does when the device is created.
    fn create(socket: &Path, queues: u16) -> Self;
    /// The features that its guests are offered.
    fn offers(&self) -> u64;
    /// The config space as its guests read it.
    fn config(&mut self) -> Config;
    /// What it does when the guest's driver is ready.
    fn activate(&mut self, guest: &Guest);
    /// What it does when the machine is paused, and when it goes on.
    fn pause(&mut self, guest: &Guest);
    fn resume(&mut self, guest: &Guest);
    /// What it does when the guest resets the device. Where that ends the monitor, `false`.
    fn reset(&mut self, guest: &Guest) -> bool;
    /// What it does when the back-end has gone and listens again, the guest running on. `None`: it gives up.
    fn reconnect(self, socket: &Path, guest: &Guest) -> Option<Self>;
}

/// A machine with its disk in use.
struct Machine<V> {
    vmm: V,
    guest: Guest,
}

const DISK_BYTES: u64 = 4 << 20;

impl<V: Vmm> Machine<V> {
    fn start(socket: &Path) -> Self {
        let mut vmm = V::create(socket, V::QUEUES);
        let config = vmm.config();
        assert_eq!(config.capacity() * 512, DISK_BYTES, "{config:?}");
        let guest = Guest::boot(V::QUEUES, vmm.offers());
        vmm.activate(&guest);
        Self { vmm, guest }
    }

    /// Writes with each queue, makes it stable, and reads it back with the others.
    #[track_caller]
    fn uses_its_disk(&mut self, round: u32) {
        let count = self.guest.queues.len() as u64;
        let sector = |queue: u64| queue * 64;
        for queue in 0..count {
            let data = pattern(round * 100 + queue as u32, 8192);
            self.guest.queues[queue as usize].write(sector(queue), &data);
        }
        if self.guest.accepted & feature::FLUSH != 0 {
            assert_eq!(self.guest.queues[0].request(&Request::flush()).status, OK);
        }
        self.finds_its_data(round);
    }

    #[track_caller]
    fn finds_its_data(&mut self, round: u32) {
        let count = self.guest.queues.len() as u64;
        for queue in 0..count {
            let reader = (queue + 1) % count;
            let data = self.guest.queues[reader as usize].read(queue * 64, 8192);
            assert_eq!(data, pattern(round * 100 + queue as u32, 8192), "what queue {queue} wrote in round {round}");
        }
    }
}

fn setup(image: &Image) -> Setup {
    Setup::file(image.path()).export("num-queues=4").iothreads(2)
}

fn does_io<V: Vmm>() {
    let image = Image::empty(DISK_BYTES);
    let backend = setup(&image).start();
    let mut machine = Machine::<V>::start(backend.socket());
    machine.uses_its_disk(1);
    assert_eq!(image.read(0, 8192), pattern(100, 8192), "on the host");
}

fn is_paused_and_goes_on<V: Vmm>() {
    let image = Image::empty(DISK_BYTES);
    let backend = setup(&image).start();
    let mut machine = Machine::<V>::start(backend.socket());
    for round in 1..6 {
        machine.uses_its_disk(round);
        machine.vmm.pause(&machine.guest);
        machine.vmm.resume(&machine.guest);
        machine.finds_its_data(round);
    }
}

fn reboots<V: Vmm>() {
    let image = Image::empty(DISK_BYTES);
    let backend = setup(&image).start();
    let mut machine = Machine::<V>::start(backend.socket());
    for round in 1..6 {
        machine.uses_its_disk(round);
        if machine.vmm.reset(&machine.guest) {
            machine.guest.reset();
            machine.vmm.activate(&machine.guest);
        } else {
            drop(machine);
            machine = Machine::start(backend.socket());
        }
        machine.finds_its_data(round);
    }
}

fn lives_through_a_restart_of_the_daemon<V: Vmm>() {
    let image = Image::empty(DISK_BYTES);
    let dir = tempfile::tempdir().expect("a directory for a socket");
    let socket = dir.path().join("disk.sock");
    let setup = setup(&image).at(&socket);
    let mut backend = setup.start();
    let mut machine = Machine::<V>::start(&socket);
    for round in 1..4 {
        machine.uses_its_disk(round);
        backend.kill();
        backend = setup.start();
        machine = match machine.vmm.reconnect(&socket, &machine.guest) {
            Some(vmm) => Machine { vmm, guest: machine.guest },
            None => Machine::start(&socket),
        };
        machine.finds_its_data(round);
    }
    drop(machine);
    drop(backend);
}

fn is_followed_by_another<V: Vmm>() {
    let image = Image::empty(DISK_BYTES);
    let backend = setup(&image).start();
    Machine::<V>::start(backend.socket()).uses_its_disk(1);
    let mut second = Machine::<V>::start(backend.socket());
    second.finds_its_data(1);
    second.uses_its_disk(2);
}

/// The scenarios for one monitor.
macro_rules! scenarios {
    ($name:ident, $vmm:ty) => {
        mod $name {
            #[test]
            fn does_io() {
                super::does_io::<$vmm>();
            }

            #[test]
            fn is_paused_and_goes_on() {
                super::is_paused_and_goes_on::<$vmm>();
            }

            #[test]
            fn reboots() {
                super::reboots::<$vmm>();
            }

            #[test]
            fn lives_through_a_restart_of_the_daemon() {
                super::lives_through_a_restart_of_the_daemon::<$vmm>();
            }

            #[test]
            fn is_followed_by_another() {
                super::is_followed_by_another::<$vmm>();
            }
        }
    };
}

scenarios!(qemu_machine, crate::profiles::qemu::Qemu);
scenarios!(cloud_hypervisor_machine, crate::profiles::cloud_hypervisor::CloudHypervisor);
scenarios!(firecracker_machine, crate::profiles::firecracker::Firecracker);
scenarios!(crosvm_machine, crate::profiles::crosvm::Crosvm);
scenarios!(dragonball_machine, crate::profiles::dragonball::Dragonball);
scenarios!(openvmm_machine, crate::profiles::openvmm::OpenVmm);
