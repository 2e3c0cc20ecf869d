# shellcheck shell=bash disable=SC2154
# Installs the packages that the local services need and the machine has not got. Needs $tool and the functions of common.sh.

# java17: prints the path of a Java that runs Cassandra 5.0 (17, or 11), fails when there is none.
java17() {
    local java
    for java in "${JAVA_HOME:+$JAVA_HOME/bin/java}" "$(command -v java)" /usr/lib/jvm/java-17-openjdk-*/bin/java; do
        if [ -x "$java" ] && [[ $("$java" -version 2>&1) =~ \"(17|11)\. ]]; then
            echo "$java"
            return
        fi
    done
    return 1
}

# install_packages NAME…: from Debian, without starting a server of theirs, now or at the next boot.
install_packages() {
    local policy=/usr/sbin/policy-rc.d created=
    [ $# -gt 0 ] || return 0
    if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
        refuse "please install (as root): apt-get install -y --no-install-recommends $*"
    fi
    say "installing $*"
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        created=1
    fi
    if ! {
        apt-get -q -o DPkg::Lock::Timeout=300 update &&
            DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@"
    } </dev/null >&2; then
        [ -z "$created" ] || rm -f "$policy"
        fail "apt-get could not install $*: see above, then try again"
    fi
    [ -z "$created" ] || rm -f "$policy"
    if [ -d /run/systemd/system ]; then
        systemctl disable --quiet etcd.service redis-server.service >/dev/null 2>&1 || true
    fi
}

# install_missing ROLE…: what etcd, redis, cassandra or scylla need.
install_missing() {
    local missing=() role
    for role; do
        case $role in
            etcd)
                command -v etcd >/dev/null || missing+=(etcd-server)
                # For snapshots, and for people and tests that look at keys.
                command -v etcdctl >/dev/null || missing+=(etcd-client)
                ;;
            redis) command -v redis-server >/dev/null || missing+=(redis-server) ;;
            cassandra)
                java17 >/dev/null || missing+=(openjdk-17-jdk-headless)
                cassandra_has_jars || command -v mvn >/dev/null || missing+=(maven)
                ;;
        esac
    done
    install_packages "${missing[@]}"
    [[ " $* " != *" cassandra "* ]] || java17 >/dev/null || fail "no Java 17 was found: set JAVA_HOME to one"
}
