use mooncake_efa::{
    config::Config,
    engine::Request,
    fabric::{Buffer, Memory},
    transport::{Options, Transport},
};
use std::time::{Duration, Instant};
fn install(name: &str, p: &str) -> Transport {
    Transport::install(Options {
        server_name: name.into(),
        topology: None,
        devices: std::env::var("DEVS")
            .map(|d| d.split(',').map(str::to_owned).collect())
            .unwrap_or_default(),
        config: Config { provider: p.into(), ..Config::from_env() },
        host: None,
        observer: None,
    })
    .unwrap()
}
fn main() {
    env_logger::init();
    let p = std::env::args().nth(1).unwrap();
    let op = std::env::args().nth(2).unwrap();
    let block: u64 = std::env::args().nth(3).unwrap().parse().unwrap();
    let role = std::env::args().nth(4).unwrap();
    let n = 64u64 << 20;
    let buf = Buffer::new(n).unwrap();
    if role == "target" {
        let t = install("t:1", &p);
        let pat: Vec<u8> = (0..n).map(|i| (i * 7 % 251) as u8).collect();
        buf.write(0, &pat);
        t.register(&[(Memory::from(&buf), "*")]).unwrap();
        std::fs::write("/tmp/smoke.desc.tmp", t.descriptor().to_json()).unwrap();
        std::fs::rename("/tmp/smoke.desc.tmp", "/tmp/smoke.desc").unwrap();
        std::thread::sleep(Duration::from_secs(
            std::env::var("SECS").map_or(8, |s| s.parse().unwrap()),
        ));
        eprintln!("target {:?}", t.stats());
        return;
    }
    let t = install("i:1", &p);
    t.register(&[(Memory::from(&buf), "*")]).unwrap();
    let json = std::fs::read_to_string("/tmp/smoke.desc").unwrap();
    let seg = mooncake_efa::segment::Segment::from_json(&json).unwrap();
    let remote = seg.buffers[0].addr;
    let id = t.open_segment(&seg).unwrap();
    let start = Instant::now();
    let (mut ops, mut off) = (0u64, 0u64);
    while start.elapsed() < Duration::from_secs(2) {
        let b = t.allocate_batch(128).unwrap();
        let reqs: Vec<Request> = (0..128)
            .map(|_| {
                let o = off;
                off = (off + block) % n;
                Request {
                    write: op == "write",
                    local: buf.address() + o,
                    target: id,
                    remote: remote + o,
                    length: block,
                    cookie: 0,
                }
            })
            .collect();
        t.submit(b, reqs.iter().copied(), None).unwrap();
        let s = t.wait(b, Duration::from_secs(5)).unwrap();
        assert_eq!(s, mooncake_efa::engine::Status::Completed);
        t.free_batch(b).unwrap();
        ops += 128;
    }
    let e = start.elapsed().as_secs_f64();
    println!(
        "{p} {op} {block}: {:.0} op/s {:.2} GB/s",
        ops as f64 / e,
        (ops * block) as f64 / e / 1e9
    );
    eprintln!("{:?}", t.stats());
}
