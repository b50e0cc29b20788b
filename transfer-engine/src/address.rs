//! Server names and ports, read as Mooncake reads them.
#![forbid(unsafe_code)]

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use mooncake_efa::config::Config;
use mooncake_efa::{Code, Error, Result};
use socket2::{Domain, Socket, Type};

/// Ports tried before we give up to find a free one.
const TRIES: usize = 500;

/// Host and port of a server name: `host`, `host:port`, `[ipv6]`, `[ipv6]:port` or an IPv6 address (with a `%scope`
/// perhaps, after which `:port` may come). Without a port, or with one that is none, it is `default`.
pub fn parse(name: &str, default: u16) -> (String, u16) {
    let port = |text: &str| text.parse().ok().filter(|&port| port != 0).unwrap_or(default);
    if let Some((host, rest)) = name.strip_prefix('[').and_then(|name| name.split_once(']')) {
        if is_ipv6(host) {
            return (host.to_owned(), rest.strip_prefix(':').map_or(default, port));
        }
    }
    if is_ipv6(name) {
        return (name.to_owned(), default);
    }
    match name.rsplit_once(':') {
        Some((host, number)) => (host.to_owned(), port(number)),
        None => (name.to_owned(), default),
    }
}

/// `host:port`, with brackets around an IPv6 address.
pub fn join(host: &str, port: u16) -> String {
    if is_ipv6(host) { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn is_ipv6(text: &str) -> bool {
    let address = text.split_once('%').map_or(text, |(address, _)| address);
    // What stands after the scope may be a port, and then it is no address alone.
    address.parse::<Ipv6Addr>().is_ok() && !text[address.len()..].contains(':')
}

/// The first address of this host that others can reach.
///
/// # Errors
/// `Code::InvalidArgument` if there is none.
pub fn of_this_host(config: &Config) -> Result<String> {
    let none = || {
        let why = "no network interface is up but the loopback; set MC_TCP_BIND_ADDRESS";
        Error::invalid(why)
    };
    if let Some(address) = &config.tcp_bind_address {
        return Ok(address.clone());
    }
    let interfaces = if_addrs::get_if_addrs().map_err(|why| {
        Error::new(Code::Context, format!("reading the network interfaces: {why}"))
    })?;
    let usable = |interface: &&if_addrs::Interface| {
        !interface.is_loopback()
            && interface.is_oper_up()
            && interface.ip().is_ipv6() == config.use_ipv6
    };
    interfaces.iter().find(usable).map(|interface| interface.ip().to_string()).ok_or_else(none)
}

/// Listens on a port: the one given, or a free one of `MC_MIN_RPC_PORT` to `MC_MAX_RPC_PORT`.
///
/// # Errors
/// `Code::Endpoint` if it, or all that were tried, are taken.
pub fn listen(config: &Config, port: Option<u16>) -> Result<(TcpListener, u16)> {
    let bind = |port: u16| -> std::io::Result<TcpListener> {
        let any: SocketAddr = if config.use_ipv6 {
            (Ipv6Addr::UNSPECIFIED, port).into()
        } else {
            (Ipv4Addr::UNSPECIFIED, port).into()
        };
        let socket = Socket::new(Domain::for_address(any), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&any.into())?;
        socket.listen(config.handshake_listen_backlog)?;
        Ok(socket.into())
    };
    let refused = |port: &dyn std::fmt::Display, why: &dyn std::fmt::Display| {
        Error::new(Code::Endpoint, format!("listening on TCP port {port}: {why}"))
    };
    if let Some(port) = port {
        return bind(port).map(|listener| (listener, port)).map_err(|why| refused(&port, &why));
    }
    let (least, most) = (*config.rpc_ports.start(), *config.rpc_ports.end());
    let mut last = None;
    for _ in 0..TRIES {
        let port = fastrand::u16(least..=most);
        match bind(port) {
            Ok(listener) => return Ok((listener, port)),
            Err(why) => last = Some(why),
        }
    }
    let why = last.map_or_else(String::new, |why| why.to_string());
    Err(refused(&format_args!("{least} to {most}"), &why))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_names() {
        for (name, host, port) in [
            ("10.0.0.1:15000", "10.0.0.1", 15000),
            ("10.0.0.1", "10.0.0.1", 7),
            ("node-3.local:1", "node-3.local", 1),
            ("node", "node", 7),
            ("[::1]:80", "::1", 80),
            ("[::1]", "::1", 7),
            ("::1", "::1", 7),
            ("fe80::1%eth0", "fe80::1%eth0", 7),
            ("fe80::1%eth0:80", "fe80::1%eth0", 80),
            ("[fe80::1%eth0]:80", "fe80::1%eth0", 80),
            ("node:x", "node", 7),
            ("node:70000", "node", 7),
            ("node:0", "node", 7),
            ("[no]:80", "[no]", 80),
            ("", "", 7),
        ] {
            assert_eq!(parse(name, 7), (host.to_owned(), port), "{name}");
        }
        assert_eq!(join("10.0.0.1", 80), "10.0.0.1:80");
        assert_eq!(join("fe80::1%eth0", 80), "[fe80::1%eth0]:80");
    }

    #[test]
    fn a_port_is_one_of_the_range_and_one_that_is_taken_is_refused() {
        let config = Config::default();
        let (listener, port) = listen(&config, None).unwrap();
        assert!(config.rpc_ports.contains(&port));
        assert_eq!(listener.local_addr().unwrap().port(), port);
        let only = Config { rpc_ports: port..=port, ..config };
        let error = listen(&only, None).unwrap_err();
        assert_eq!(error.code, Code::Endpoint);
        assert!(error.text.contains(&port.to_string()), "{error}");
        assert_eq!(listen(&only, Some(port)).unwrap_err().code, Code::Endpoint);
    }
}
