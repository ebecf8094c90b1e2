@ 
read 0 512
length
map
close
frobnicate
