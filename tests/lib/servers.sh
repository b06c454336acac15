# Sourced by scripts that run servers on free ports of this machine; from the repository's root.
# Sets `folder`, a place for their files that goes away with the script, as they do.
ulimit -n "$(ulimit -Hn)"
folder=$(mktemp -d)
chmod 755 "$folder" # nginx reads its file as another user
pids=()
finish() {
    ((${#pids[@]} == 0)) || kill "${pids[@]}" 2>/dev/null || true
    wait
    rm -rf "$folder"
}
trap finish EXIT

# The kernel does not give it out again at once.
free_port() {
    /usr/bin/python3 -c 'import socket
s = socket.socket()
s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])'
}

# start NAME PORT PATH COMMAND...: in the background, until PATH is answered. Its process is $pid.
start() {
    local name=$1 url=http://127.0.0.1:$2$3
    shift 3
    "$@" >"$folder/$name.log" 2>&1 &
    pid=$!
    pids+=("$pid")
    for ((i = 0; i < 600; i++)); do
        curl -fs -o "$folder/answer" "$url" && return
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    echo "$name does not answer at $url:" >&2
    tail "$folder/$name.log" >&2
    exit 1
}

stop() {
    local other left=()
    kill "$1"
    wait "$1" 2>/dev/null || true
    for other in "${pids[@]}"; do
        [[ $other == "$1" ]] || left+=("$other")
    done
    pids=("${left[@]}")
}

# start_rambad NAME COMMAND...: with settings beside those that the command has, on a port of its
# own, which is $port.
start_rambad() {
    local name=$1
    shift
    port=$(free_port)
    mkdir -p "$folder/$name"
    start "$name" "$port" /health/ready "$@" --port "$port" --data "$folder/$name" --log-level warn
}
